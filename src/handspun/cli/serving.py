"""The command serve."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from handspun.cli.app import (
    FLAT,
    ComputeOptions,
    ModelOptions,
    TemplateOptions,
    app,
    default_model,
    load_model,
    quick_imports,
)
from handspun.config.serving import ServeOptions
from handspun.errors import check_installed

if TYPE_CHECKING:
    from handspun.models.load import ChatModel


@app.command
def serve(
    *models: str,
    options: Annotated[ServeOptions, FLAT] = ServeOptions(),  # noqa: B008
    compute: Annotated[ComputeOptions, FLAT] = ComputeOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
) -> None:
    """Serve models over HTTP with OpenAI's interface: chat, completions, tools, structured outputs.

    Parameters
    ----------
    models
        Models to serve, the same as --model.
    """
    for package in ("uvicorn", "starlette", "pydantic"):
        check_installed(package, "serve", "handspun serve")
    with quick_imports():
        from handspun.serve.server import serve as run_server

    def load(path: str) -> "ChatModel":
        source = ModelOptions(model=path, weights=compute.weights, device=compute.device, threads=compute.threads)
        return load_model(source, template)

    named = (*models, *options.model) or (default_model(),)
    run_server(replace(options, model=named), load)
