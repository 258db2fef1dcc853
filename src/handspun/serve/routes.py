"""The table of routes. The router, /openapi.json and the tests are made from it."""

from collections.abc import Mapping, Sequence

from handspun.config.serving import ServeOptions
from handspun.serve.app import Endpoint, Page, Service
from handspun.serve.chat import chat_completions
from handspun.serve.chat_page import PAGE, page_files
from handspun.serve.collect import collect
from handspun.serve.completions import completions
from handspun.serve.pages import health, metrics, models, one_model, openapi, version
from handspun.serve.responses import responses
from handspun.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExplainRequest,
    ResponsesRequest,
    RowRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)
from handspun.serve.tokens import apply_template, detokenize, explain, score, tokenize

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


ENDPOINTS = with_openapi(
    [
        *ABOUT,
        Endpoint(
            "/v1/chat/completions",
            "Answer a conversation.",
            handler=chat_completions,
            body=ChatRequest,
            streams=True,
        ),
        Endpoint(
            "/v1/completions",
            "Continue or score a text.",
            handler=completions,
            body=CompletionRequest,
            streams=True,
        ),
        Endpoint(
            "/v1/responses",
            "Answer a conversation, in the newer form.",
            handler=responses,
            body=ResponsesRequest,
            streams=True,
            is_named=True,
        ),
        Endpoint("/v1/explain", "How the next token is chosen.", handler=explain, body=ExplainRequest),
        Endpoint("/v1/score", "How probable an answer's tokens are.", handler=score, body=ScoreRequest),
        Endpoint("/tokenize", "The tokens of a text or a conversation.", handler=tokenize, body=TokenizeRequest),
        Endpoint("/detokenize", "The text of tokens.", handler=detokenize, body=DetokenizeRequest),
        Endpoint(
            "/apply-template",
            "A conversation as the model sees it, and who wrote each token.",
            handler=apply_template,
            body=TemplateRequest,
        ),
        Endpoint("/collect", "Append a row to train on to the server's file.", handler=collect, body=RowRequest),
    ]
)
"""All routes of the interface."""


def routes(options: ServeOptions) -> list[Endpoint]:
    """Return all routes of a server."""
    if options.page:
        page_files()  # read and packed before anyone waits for them
    return [*ENDPOINTS, *(PAGE if options.page else ())]
