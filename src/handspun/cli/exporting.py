"""The command export."""

from typing import Annotated

from handspun.cli.app import FLAT, app
from handspun.config import ExportConfig


@app.command
def export(*, config: Annotated[ExportConfig, FLAT]) -> None:
    """Export a checkpoint: a merged folder, a GGUF file for llama.cpp, or a repository on the Hugging Face hub."""
    from handspun.exports.export import export as run_export

    run_export(config)
