"""What the server says of itself: health, metrics, version, the list of models, and its own description."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

import handspun
from handspun import __version__
from handspun.display import join_names, printable
from handspun.serve.app import Endpoint, Page, Service
from handspun.serve.errors import ApiError
from handspun.serve.metrics import CONTENT_TYPE


def health(service: Service, _: Mapping[str, str]) -> Page:
    """Return status "ok", or 503 with the reason."""
    try:
        service.check_ready()
    except ApiError as error:
        return Page({"status": service.state, **error.body()}, error.status, headers=error.headers)
    return Page({"status": "ok"})


def metrics(service: Service, _: Mapping[str, str]) -> Page:
    """Return all metrics as Prometheus reads them."""
    is_up = service.worker is not None and service.worker.state != "failed"
    return Page(service.metrics.text(engine_up=is_up), content_type=CONTENT_TYPE)


def version(service: Service, _: Mapping[str, str]) -> Page:
    """Return versions, git commit, threads, each model's type of weights, and whether /collect keeps rows."""
    import torch

    from handspun.kernels import kernels_for

    return Page(
        {
            "version": __version__,
            "git": git_commit(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "int8_kernels": kernels_for(torch.device("cpu")).name,
            "weights": {name: served.describe()["weights"] for name, served in service.models.items()},
            "collects_rows": service.options.collect is not None,
        }
    )


@cache
def git_commit() -> str | None:
    """Return the commit of this code, if it runs from a checkout or was installed from a repository."""
    folder = Path(handspun.__file__).parent
    try:
        installed = metadata.distribution("handspun").read_text("direct_url.json")
        if commit := json.loads(installed or "{}").get("vcs_info", {}).get("commit_id"):
            return str(commit)
        # A package that is installed inside of another project's checkout is not in its index.
        git = ["git", "-C", str(folder)]
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    except (OSError, ValueError, subprocess.CalledProcessError, metadata.PackageNotFoundError):
        return None
    return head.stdout.strip()


def models(service: Service, _: Mapping[str, str]) -> Page:
    """Return the list of models."""
    return Page({"object": "list", "data": [served.describe() for served in service.models.values()]})


def one_model(service: Service, parameters: Mapping[str, str]) -> Page:
    """Return one model's entry. Raises ApiError if it is not served."""
    name = parameters["model"]
    if name not in service.models:
        raise ApiError(
            f"there is no model {printable(name)} (expected one of {join_names(service.models)}).",
            "not_found_error",
            code="model_not_found",
            param="model",
        )
    return Page(service.models[name].describe())


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI document of a table of routes."""
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    _, schemas = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies)], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Handspun", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is wrong.",
    "401": "The API key is missing or wrong.",
    "403": "The Host or the Origin is not allowed.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too many requests wait.",
    "500": "The server failed.",
    "503": "The server is loading, stopping, or its engine has failed.",
    "504": "The request waited or ran too long.",
}


def _operation(endpoint: Endpoint, path: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    told = _statuses(endpoint, path)
    found: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{path}".replace("/", "_").replace("{", "").replace("}", ""),
        "security": [{"key": []}] if endpoint.needs_key else [],
        "responses": {
            "200": {"description": "The answer.", "content": _content(endpoint)},
            **{status: {"description": _STATUSES[status], "content": error} for status in told},
        },
    }
    if endpoint.body is not None:
        schema = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found


def _statuses(endpoint: Endpoint, path: str) -> list[str]:
    if endpoint.body is not None:
        return list(_STATUSES)
    return [
        *(["401"] if endpoint.needs_key else []),
        "403",
        *(["404"] if "{" in path else []),
        "500",
        *(["503"] if endpoint.needs_models or path == "/health" else []),
    ]


def _content(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.page is metrics:
        return {"text/plain": {"schema": {"type": "string"}}}
    events: dict[str, Any] = {"text/event-stream": {}} if endpoint.streams else {}
    return {"application/json": {"schema": {"type": "object"}}, **events}
