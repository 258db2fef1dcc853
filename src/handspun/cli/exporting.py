"""The command that makes other forms of a checkpoint: export."""

from typing import Annotated

from handspun.cli.app import FLAT, app
from handspun.config import ExportConfig
from handspun.display import say


@app.command
def export(*, config: Annotated[ExportConfig, FLAT]) -> None:
    """Make other forms of a checkpoint: one merged folder, a GGUF file for llama.cpp, a repository on the hub."""
    from handspun.export.export import export as run_export

    run_export(config, notice=say)
