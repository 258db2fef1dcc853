"""Options of `handspun serve`. The text under each field is its help text."""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from handspun.config.names import options
from handspun.config.ranges import MOST, Ranges, problem_with, wrong_values
from handspun.errors import ConfigError

KEY_VARIABLE = "HANDSPUN_API_KEY"
"""The environment variable with an API key. A key on the command line would be seen by everyone on the machine."""


@options
class ServeOptions:
    """What is served, to whom, and within which limits.

    A request beyond a limit is refused with an error that names the limit.
    """

    model: tuple[str, ...] = ()
    """Model to serve, or NAME=MODEL to choose the name that clients use. A model is a hub id, a folder, a run's
    output folder (its best checkpoint), an adapter folder, a .gguf file, or "smollm2-135m". Repeatable. Default:
    the run in output/ if there is one, else Qwen/Qwen2.5-0.5B."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs an API key."""

    port: int = 8000
    """Port to listen on. 0 takes a free one."""

    api_key_file: str | None = None
    """File with one API key per line. Clients send one of them as a bearer token. HANDSPUN_API_KEY in the
    environment is one more key. Without any, no key is asked for. SIGHUP has the file read again."""

    without_key: bool = False
    """Let other machines in without an API key, for a network that you trust."""

    allowed_host: tuple[str, ...] = ()
    """Host name that requests may be addressed to, besides IP addresses, localhost and --host. Repeatable."""

    allowed_origin: tuple[str, ...] = ()
    """Web origin, such as https://chat.example, whose pages may call the server from a browser. Repeatable."""

    page: bool = True
    """Serve the chat page at /."""

    collect: str | None = None
    """File (.jsonl) to which POST /collect appends rows to train on, such as answers corrected on the chat page.
    If not given, the server writes nothing."""

    log_requests: bool = True
    """Print one line per request: status, seconds and token counts, never a prompt."""

    max_rows: int = 32
    """Maximum number of answers and beams decoded together."""

    max_queue: int = 64
    """Maximum number of waiting requests. More get status 429."""

    kv_tokens: int | None = None
    """Number of tokens whose keys and values are kept. If not given, it depends on the free memory."""

    cache_mb: int = 512
    """Megabytes for the beginnings of prompts that may come again. 0 turns the prompt cache off."""

    target_step_ms: float = 100.0
    """Milliseconds that a step may take. Long prompts are cut into pieces that fit, so other answers go on."""

    max_tokens: int = 4096
    """Maximum number of tokens of an answer. A request for more gets this many."""

    queue_seconds: float = 60.0
    """Seconds that a request may wait for its first step. After them it gets status 504."""

    request_seconds: float = 600.0
    """Seconds that a request may take."""

    drain_seconds: float = 30.0
    """Seconds that running answers have to finish after Ctrl-C or SIGTERM."""

    max_body_mb: float = 2.0
    """Maximum size of a request's body in megabytes (of 1,048,576 bytes)."""

    max_json_depth: int = 64
    """Maximum nesting depth of a request's JSON."""

    max_messages: int = 2048
    """Maximum number of messages of a request."""

    max_tools: int = 128
    """Maximum number of tools of a request."""

    max_choices: int = 16
    """Maximum number of answers and beams of a request (n, best_of, num_beams)."""

    max_prompts: int = 64
    """Maximum number of prompts of a request to /v1/completions."""

    max_stop_strings: int = 16
    """Maximum number of stop strings of a request."""

    max_logit_bias: int = 1024
    """Maximum number of token ids in logit_bias."""

    max_top_logprobs: int = 20
    """Maximum number of alternatives per token."""

    max_schema_kb: int = 64
    """Maximum size of a JSON schema in kilobytes."""

    max_regex_kb: int = 4
    """Maximum size of a regular expression in kilobytes."""

    grammar_seconds: float = 5.0
    """Seconds that a JSON schema or regular expression may take to compile."""

    max_connections: int = 256
    """Maximum number of open connections."""

    read_seconds: float = 30.0
    """Seconds that a client may take to send a request's header, and as many for its body."""

    send_seconds: float = 30.0
    """Seconds that a client may leave an answer unread. After them its connection is closed."""

    keep_alive_seconds: int = 15
    """Seconds that an idle connection stays open."""

    ping_seconds: float = 15.0
    """Seconds of silence after which a stream gets a comment, so that proxies keep it open."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, _RANGES) or [*_wrong_texts(self), *_unprotected(self)]:
            raise ConfigError(problems)

    @property
    def max_body_bytes(self) -> int:
        """Maximum size of a request's body in bytes."""
        return int(self.max_body_mb * 2**20)


_COUNT, _SECONDS = (1, MOST, True, True), (0.01, 86_400, True, True)
_RANGES: Ranges = {
    "port": (0, 65_535, True, True),
    "cache_mb": (0, MOST, True, True),
    "max_body_mb": (0.001, 1024, True, True),
    "max_json_depth": (1, 500, True, True),  # Python's own parser ends at its recursion limit of 1,000
    "max_choices": (1, 1000, True, True),
    "target_step_ms": (1, 60_000, True, True),
    "drain_seconds": (0, 86_400, True, True),
    "keep_alive_seconds": (1, 86_400, True, True),
    **dict.fromkeys(
        ("max_queue", "max_stop_strings", "max_logit_bias", "max_top_logprobs"), (0, MOST, True, True)
    ),
    **dict.fromkeys(("max_rows", "kv_tokens", "max_tokens", "max_messages", "max_tools", "max_prompts"), _COUNT),
    **dict.fromkeys(("max_schema_kb", "max_regex_kb", "max_connections"), _COUNT),
    **dict.fromkeys(("queue_seconds", "request_seconds", "grammar_seconds", "read_seconds"), _SECONDS),
    **dict.fromkeys(("send_seconds", "ping_seconds"), _SECONDS),
}
_ROW_FILES = (".jsonl", ".ndjson")
"""What training reads as JSON lines."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
"""Names that stand in a URL's path, in a log line and in a label as they are."""


def served_models(models: tuple[str, ...]) -> dict[str, str]:
    """Return the models to load by the names that clients use. Raises ConfigError for a name that is there twice.

    A model without a name is served under what was typed, or under the last part of a path that is absolute or
    leads upwards, so that no client sees where the model lies.
    """
    found: dict[str, str] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists() or not _NAME.fullmatch(name):
            name, path = told_name(text), text
        if name in found:
            raise ConfigError(
                f"--model {text}: there are two models named {name}. Name one of them differently, as in "
                f"--model other={path}."
            )
        found[name] = path
    return found


def told_name(path: str) -> str:
    """Return a model's name as clients see it: of a path that shows where it lies, only the last part."""
    plain = os.path.normpath(path)
    is_told = not os.path.isabs(plain) and not plain.startswith(("..", "~"))
    return plain.replace(os.sep, "/") if is_told else os.path.basename(os.path.abspath(os.path.expanduser(plain)))


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _wrong_texts(config: ServeOptions) -> list[str]:
    problems = []
    for model in config.model:
        if not model.strip() or "\0" in model or model.endswith("="):
            problems.append(problem_with("model", model, "a model, or NAME=MODEL"))
    if not config.host.strip():
        problems.append(problem_with("host", config.host, "an address, such as 127.0.0.1"))
    if config.collect is not None and ("\0" in config.collect or not config.collect.endswith(_ROW_FILES)):
        problems.append(problem_with("collect", config.collect, "a file that ends with .jsonl"))
    for host in config.allowed_host:
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
            problems.append(problem_with("allowed_host", host, "a host name without a port, such as chat.example"))
    for origin in config.allowed_origin:
        if not _is_origin(origin):
            problems.append(problem_with("allowed_origin", origin, "an origin, such as https://chat.example"))
    return problems


def _is_origin(text: str) -> bool:
    """Return whether the text is an origin as browsers send it, such as https://chat.example:8443."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises ValueError if it is no number
    except ValueError:
        return False
    return (
        bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}" and text.isprintable()
    )


def _unprotected(config: ServeOptions) -> list[str]:
    """Return what is wrong if other machines could use the server without a key."""
    has_key = bool(config.api_key_file or os.environ.get(KEY_VARIABLE))
    if has_key or config.without_key or is_loopback(config.host):
        return []
    return [
        f"--host {config.host} lets other machines in, and there is no API key. Write one into a file and add "
        f"--api-key-file FILE, or set {KEY_VARIABLE}; or add --without-key if you trust the network."
    ]
