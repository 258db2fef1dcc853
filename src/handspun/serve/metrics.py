"""Counters, gauges and histograms in Prometheus' text format.

Both the engine's thread and the event loop write them. Labels come from fixed sets: routes, statuses, and names of
served models, never a client's text.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds in seconds: of steps and gaps between tokens, and of what a person waits for."""

Labels = tuple[str, ...]


@dataclass
class _Distribution:
    """Counts per bucket (the last one is for larger values), and the sum of all values."""

    counts: list[int]
    total: float = 0.0


@dataclass
class _Family:
    """One metric: its values by labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Sequence[str] = ()
    buckets: Sequence[float] = ()
    values: dict[Labels, float] = field(default_factory=dict)
    distributions: dict[Labels, _Distribution] = field(default_factory=dict)

    def add(self, amount: float, labels: Labels = ()) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def observe(self, value: float, labels: Labels = ()) -> None:
        found = self.distributions.get(labels)
        if found is None:
            found = self.distributions[labels] = _Distribution([0] * (len(self.buckets) + 1))
        found.counts[bisect_left(self.buckets, value)] += 1
        found.total += value

    def lines(self) -> Iterator[str]:
        name = f"handspun_{self.name}"
        yield f"# HELP {name} {self.help}"
        yield f"# TYPE {name} {self.kind}"
        for labels, value in sorted(self.values.items()):
            yield f"{name}{self._labels(labels)} {_number(value)}"
        for labels, found in sorted(self.distributions.items()):
            below = 0
            for bound, count in zip((*self.buckets, float("inf")), found.counts, strict=True):
                below += count
                yield f"{name}_bucket{self._labels(labels, le=_number(bound))} {below}"
            yield f"{name}_sum{self._labels(labels)} {_number(found.total)}"
            yield f"{name}_count{self._labels(labels)} {below}"

    def _labels(self, values: Labels, le: str | None = None) -> str:
        pairs = [*zip(self.labels, values, strict=True), *([("le", le)] if le else [])]
        text = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)
        return f"{{{text}}}" if text else ""


class Metrics:
    """All metrics of a server."""

    def __init__(self, models: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._families: list[_Family] = []
        self._requests = self._counter(
            "requests_total", "Answered HTTP requests. 499: the client left.", "endpoint", "status", "model"
        )
        self._request_seconds = self._histogram(
            "request_seconds", "From a request's header to the end of its answer.", _SLOW, "endpoint"
        )
        self._started = self._counter("started_total", "Requests of which a row has begun to run.", "model")
        self._rejected = self._counter("rejected_total", "Requests that the engine did not run.", "reason")
        self._cancelled = self._counter("cancelled_total", "Requests whose client left before the end.", "phase")
        self._running = self._gauge("running", "Rows that run.")
        self._waiting = self._gauge("waiting", "Requests that wait for their first step.")
        self._prompt = self._counter("prompt_tokens_total", "Tokens of prompts, cached ones among them.")
        self._cached = self._counter("cached_tokens_total", "Tokens of prompts that the prompt cache had.")
        self._generated = self._counter("generated_tokens_total", "Generated tokens.")
        self._drafted = self._counter("drafted_total", "Draft tokens that were tried.")
        self._accepted = self._counter("accepted_total", "Draft tokens that were right.")
        self._kv_used = self._gauge("kv_tokens_used", "Tokens whose keys and values are kept.")
        self._kv_capacity = self._gauge("kv_tokens_capacity", "Most tokens whose keys and values can be kept.")
        self._cache_bytes = self._gauge("cache_bytes", "Bytes of the prompt cache.")
        self._steps = self._histogram("step_seconds", "Time of a step of the engine.", _FAST, "kind")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _SLOW, "model"
        )
        self._gap = self._histogram("inter_token_seconds", "Between two pieces of one answer.", _FAST)
        self._queue_seconds = self._histogram("queue_seconds", "From submission to the first step.", _SLOW)
        self._grammar = self._histogram(
            "grammar_compile_seconds", "Compiling a JSON schema, a regular expression or a choice.", _FAST
        )
        self._engine_up = self._gauge("engine_up", "1 if the engine answers, else 0.")
        for phase in ("queued", "prefill", "decode"):
            self._cancelled.add(0, (phase,))
        for reason in ("queue_full", "draining", "timeout"):
            self._rejected.add(0, (reason,))
        for model in models:
            self._started.add(0, (model,))

    def request_started(self, model: str) -> None:
        """Count a request of which a row begins to run."""
        with self._lock:
            self._started.add(1, (model,))

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time from a request's submission to its first token."""
        with self._lock:
            self._first_token.observe(seconds, (model,))

    def queued(self, seconds: float) -> None:
        """Record the time from a request's submission to its first step."""
        with self._lock:
            self._queue_seconds.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        """Record the time between two chunks of one answer."""
        with self._lock:
            self._gap.observe(seconds)

    def step(self, kind: str, seconds: float) -> None:
        """Record a step. kind: "decode", "prefill" or "mixed"."""
        with self._lock:
            self._steps.observe(seconds, (kind,))

    def tokens(
        self, *, prompt: int = 0, cached: int = 0, generated: int = 0, drafted: int = 0, accepted: int = 0
    ) -> None:
        """Count tokens."""
        with self._lock:
            self._prompt.add(prompt)
            self._cached.add(cached)
            self._generated.add(generated)
            self._drafted.add(drafted)
            self._accepted.add(accepted)

    def rejected(self, reason: str) -> None:
        """Count a request that was not run. reason: "queue_full", "draining" or "timeout"."""
        with self._lock:
            self._rejected.add(1, (reason,))

    def cancelled(self, phase: str) -> None:
        """Count a cancelled request. phase: "queued", "prefill" or "decode"."""
        with self._lock:
            self._cancelled.add(1, (phase,))

    def gauges(self, *, running: int, waiting: int, kv_used: int, kv_capacity: int, cache_bytes: int) -> None:
        """Set the engine's gauges."""
        with self._lock:
            for family, value in (
                (self._running, running),
                (self._waiting, waiting),
                (self._kv_used, kv_used),
                (self._kv_capacity, kv_capacity),
                (self._cache_bytes, cache_bytes),
            ):
                family.values[()] = value

    def grammar_compiled(self, seconds: float) -> None:
        """Record the time of compiling a constraint."""
        with self._lock:
            self._grammar.observe(seconds)

    def request(self, endpoint: str, status: int, model: str, seconds: float) -> None:
        """Record an answered HTTP request. endpoint: the route's path. model: a served model's name, or ""."""
        with self._lock:
            self._requests.add(1, (endpoint, str(status), model))
            self._request_seconds.observe(seconds, (endpoint,))

    def text(self, *, engine_up: bool) -> str:
        """Return all metrics in Prometheus' text format."""
        with self._lock:
            self._engine_up.values[()] = int(engine_up)
            return "".join(f"{line}\n" for family in self._families for line in family.lines())

    def _counter(self, name: str, help: str, *labels: str) -> _Family:
        return self._add(_Family(name, "counter", help, labels))

    def _gauge(self, name: str, help: str) -> _Family:
        return self._add(_Family(name, "gauge", help))

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> _Family:
        return self._add(_Family(name, "histogram", help, labels, buckets))

    def _add(self, family: _Family) -> _Family:
        self._families.append(family)
        if not family.labels:  # it has one value, which is there from the start
            if family.kind == "histogram":
                family.distributions[()] = _Distribution([0] * (len(family.buckets) + 1))
            else:
                family.values[()] = 0
        return family


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
