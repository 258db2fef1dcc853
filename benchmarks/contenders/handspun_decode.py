"""Decoding with `handspun.generate`, timed. Argument: a job (decoding.py), with options of `handspun.load`."""

import os
from collections.abc import Callable
from typing import Any

import torch

import handspun
from decoding import DecodingJob, Prompt, job_of_this_process, measure, weights_a_token


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    if not job.native:
        os.environ["HANDSPUN_KERNELS"] = "reference"  # read when the first int8 layer is made
    model = handspun.load(job.model, **job.options)
    weights = job.options["weights"]
    measure(
        job,
        lambda batch: decode(model, batch, job),
        lambda prompt, came: stream(model, prompt, job, came),
        engine=f"Handspun {handspun.__version__}",
        weights=weights if job.native else f"{weights}, no native kernels",
        bytes_a_token=weights_a_token(model.model) * {"int8": 1, "float32": 4}[weights],
    )


def decode(model: handspun.ChatModel, batch: list[Prompt], job: DecodingJob) -> list[list[int]]:
    """Greedy or beams."""
    results = handspun.generate(
        model, [prompt.text for prompt in batch], batch_size=len(batch) * job.beams, num_beams=job.beams,
        **options(job),
    )  # fmt: skip
    assert [result.prompt_token_ids for result in results] == [prompt.ids for prompt in batch]
    return [result.token_ids for result in results]


def stream(model: handspun.ChatModel, prompt: Prompt, job: DecodingJob, came: Callable[[], None]) -> None:
    """Greedy."""
    for _ in handspun.stream(model, prompt.text, **options(job)):
        came()


def options(job: DecodingJob) -> dict[str, Any]:
    """Nothing is taken from the model's generation_config, and no string stops an answer."""
    return {
        "max_new_tokens": job.new_tokens, "min_new_tokens": 0, "suppress_tokens": tuple(job.end_ids),
        "stop_strings": (), "do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main()
