"""Decoding with `handspun.generate`, timed. Argument: a job (decoding.py), with options of `handspun.load`."""

import torch

import handspun
from decoding import DecodingJob, Prompt, job_of_this_process, time_batches


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    model = handspun.load(job.model, notice=_unsaid, **job.options)
    weights = job.options.get("weights", "float32")
    time_batches(job, f"Handspun {handspun.__version__}, {weights}", lambda batch: decode(model, batch, job))


def decode(model: handspun.ChatModel, batch: list[Prompt], job: DecodingJob) -> list[list[int]]:
    """Nothing is taken from the model's generation_config, and no string stops an answer."""
    results = handspun.generate(
        model, [prompt.text for prompt in batch], batch_size=len(batch) * job.beams, notice=_unsaid,
        max_new_tokens=job.new_tokens, min_new_tokens=job.new_tokens, num_beams=job.beams,
        do_sample=False, repetition_penalty=1.0, no_repeat_ngram_size=0, stop_strings=(),
    )  # fmt: skip
    assert [result.prompt_token_ids for result in results] == [prompt.ids for prompt in batch]
    return [result.token_ids for result in results]


def _unsaid(text: str) -> None:
    """Only the figures are printed."""


if __name__ == "__main__":
    main()
