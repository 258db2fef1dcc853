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
    """Exactly so many for each prompt: the ids that would end an answer are not allowed."""
    end_ids: list[int]
    beams: int = 1
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    """Of the contender's own loading."""


def job_of_this_process() -> DecodingJob:
    """The job in the command line's one argument, a JSON object; its batches are in a file that it names."""
    job = json.loads(sys.argv[1])
    with open(job["batches"], encoding="utf-8") as file:
        job["batches"] = [[Prompt(**prompt) for prompt in batch] for batch in json.load(file)]
    return DecodingJob(**job)


def time_batches(job: DecodingJob, engine: str, decode: Callable[[list[Prompt]], list[list[int]]]) -> None:
    """Prints the seconds of every batch but the first, the last batch's first answer, and the engine's name.

    decode: prompts to the new tokens of each.
    """
    seconds = []
    for batch in job.batches:
        began = time.perf_counter()
        answers = decode(batch)
        seconds.append(time.perf_counter() - began)
        lengths = [len(ids) for ids in answers]
        if lengths != [job.new_tokens] * len(batch):
            raise SystemExit(f"{engine}: {lengths} new tokens where {job.new_tokens} were asked for")
    answer(engine=engine, seconds=seconds[1:], ids=answers[0])
