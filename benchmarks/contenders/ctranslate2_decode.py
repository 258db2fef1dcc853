"""Decoding with CTranslate2 in int8, timed. Argument: a job (decoding.py) with a converted model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from decoding import DecodingJob, Prompt, job_of_this_process, measure


def main() -> None:
    job = job_of_this_process()
    generator = ctranslate2.Generator(
        job.converted, device="cpu", inter_threads=1, intra_threads=job.threads, compute_type="int8"
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    measure(
        job,
        lambda batch: decode(generator, tokenizer, batch, job),
        lambda prompt, came: decode(generator, tokenizer, [prompt], job, callback=told(came)),
        engine=f"CTranslate2 {ctranslate2.__version__}",
        weights="int8",
        bytes_a_token=(Path(job.converted) / "model.bin").stat().st_size,
    )


def decode(
    generator: ctranslate2.Generator,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Prompt],
    job: DecodingJob,
    **options: Any,
) -> list[list[int]]:
    """Greedy or beams. min_length does not keep its beam search from ending an answer; excluded tokens do."""
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt.ids) for prompt in batch],
        max_length=job.new_tokens, min_length=job.new_tokens, end_token=job.end_ids,
        suppress_sequences=[[token] for token in tokenizer.convert_ids_to_tokens(job.end_ids)],
        beam_size=job.beams, sampling_topk=1, include_prompt_in_result=False, **options,
    )  # fmt: skip
    return [result.sequences_ids[0] for result in results]


def told(came: Callable[[], None]) -> Callable[[Any], bool]:
    """What the engine calls for each token; a true answer would stop it."""

    def callback(step: Any) -> bool:  # noqa: ARG001
        came()
        return False

    return callback


if __name__ == "__main__":
    main()
