"""The table of routes. The router, /openapi.json and the tests are made from it."""

from collections.abc import Mapping, Sequence

from handspun.serve.app import Endpoint, Page, Service
from handspun.serve.pages import health, metrics, models, one_model, openapi, version

ABOUT = (
    Endpoint("/health", "Whether requests can be answered.", page=health, needs_key=False, needs_models=False),
    Endpoint("/metrics", "Metrics as Prometheus reads them.", page=metrics, needs_models=False),
    Endpoint("/version", "Versions, threads, and types of weights.", page=version, needs_models=False),
    Endpoint("/v1/models", "The models that are served.", page=models),
    Endpoint("/v1/models/{model:path}", "One model.", page=one_model),
)
"""The routes that need no handler."""


def with_openapi(endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """Return the table with the route of its own description."""
    path, summary = "/openapi.json", "This document."

    def page(_: Service, __: Mapping[str, str]) -> Page:
        return Page(document)

    table = [*endpoints, Endpoint(path, summary, page=page, needs_models=False)]
    document = openapi(table)
    return table


ENDPOINTS = with_openapi(ABOUT)
