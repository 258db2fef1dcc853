"""What a contender of decode.py is asked to do, and its clock. Standard library only, as job.py."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from job import answer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A user message, and the ids that the model's chat template makes of it."""

    text: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class DecodingJob:
    """Batches of prompts, each decoded in one call; the first of them only warms up."""

    model: str
    converted: str = ""
    """What the engine reads in place of the model's folder, where it has a format of its own."""
    batches: list[list[Prompt]]
    new_tokens: int
    """So many for each prompt."""
    end_ids: list[int]
    """That would end an answer in one of the engines: none of them is allowed."""
    beams: int = 1
    streamed: bool = False
    """One prompt a batch, token by token."""
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    """Of the contender's own loading."""
    native: bool = True
    """Whether Handspun's kernels take part."""


Decode = Callable[[list[Prompt]], list[list[int]]]
"""Prompts to the new tokens of each."""
Stream = Callable[[Prompt, Callable[[], None]], object]
"""Decodes a prompt, and calls the function whenever a token has come."""


def job_of_this_process() -> DecodingJob:
    """The job in the command line's one argument, a JSON object; its batches are in a file that it names."""
    job = json.loads(sys.argv[1])
    with open(job["batches"], encoding="utf-8") as file:
        job["batches"] = [[Prompt(**prompt) for prompt in batch] for batch in json.load(file)]
    return DecodingJob(**job)


def measure(job: DecodingJob, decode: Decode, stream: Stream, **engine: Any) -> None:
    """Prints what was measured over all batches but the first.

    engine: its name and version, `weights` as it holds them, and `bytes_a_token`, those of them that decoding one
    row reads for each token.
    """
    figures = _time_streams(job, stream) if job.streamed else _time_batches(job, decode)
    answer(**engine, **figures)


def _time_batches(job: DecodingJob, decode: Decode) -> dict[str, Any]:
    """Seconds and new tokens of each batch, and the last batch's first answer."""
    seconds, tokens = [], []
    for batch in job.batches:
        began = time.perf_counter()
        answers = decode(batch)
        seconds.append(time.perf_counter() - began)
        assert len(answers) == len(batch)
        tokens.append(sum(map(len, answers)))
    return {"seconds": seconds[1:], "tokens": tokens[1:], "ids": answers[0]}


def _time_streams(job: DecodingJob, stream: Stream) -> dict[str, Any]:
    """Seconds to the first token, and tokens a second after it."""
    first, rates = [], []
    for [prompt] in job.batches:
        began, times = time.perf_counter(), list[float]()
        stream(prompt, lambda: times.append(time.perf_counter()))  # noqa: B023  # called in this turn alone
        first.append(times[0] - began)
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return {"first": first[1:], "rates": rates[1:]}


def weights_a_token(model: Any) -> int:
    """Weights of a transformers model that every token goes through: all matrices and norms. Of the embedding a
    token reads one row, and the head is as large."""
    own = (weight.numel() for name, weight in model.named_parameters() if not _is_at_an_end(name))
    return int(sum(own) + model.config.vocab_size * model.config.hidden_size)


def _is_at_an_end(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name
