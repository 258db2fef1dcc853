"""The chat page: a fixed set of files, read once, and the headers that keep it from running anything else."""

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from handspun.display import printable
from handspun.serve.app import Endpoint, Page, Service
from handspun.serve.errors import ApiError

FOLDER = Path(__file__).with_name("page")

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""A model's words are shown as HTML. Whatever they hold, no script of theirs runs and nothing is fetched."""


@cache
def page_files() -> dict[str, Page]:
    """Return the files of the page by their names. No other name is ever looked for on the disk."""
    return {
        path.relative_to(FOLDER).as_posix(): _page(path)
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in _TYPES
    }


def _page(path: Path) -> Page:
    """Return a file as it is sent. A browser that has it already gets no body."""
    text = path.read_text(encoding="utf-8")
    # A weak one: the same for a body that is packed.
    tag = f'W/"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
    return Page(
        text,
        content_type=_TYPES[path.suffix],
        headers={**HEADERS, "ETag": tag, "Vary": "Accept-Encoding"},
        packed=gzip.compress(text.encode(), mtime=0),
    )


def index(_: Service, __: Mapping[str, str]) -> Page:
    """Return the page."""
    return page_files()["index.html"]


def static(_: Service, parameters: Mapping[str, str]) -> Page:
    """Return one of its files. Raises ApiError."""
    name = parameters["name"]
    if name not in page_files():
        raise ApiError(f"there is no file {printable(name)}.", "not_found_error")
    return page_files()[name]


PAGE = (
    Endpoint("/", "The chat page.", page=index, needs_key=False, needs_models=False),
    Endpoint("/static/{name:path}", "A file of the chat page.", page=static, needs_key=False, needs_models=False),
)
"""The routes of the page. They are no part of the interface that /openapi.json describes."""
