"""Decoding with CTranslate2 in int8, timed. Argument: a job (decoding.py) with a converted model."""

import ctranslate2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from decoding import DecodingJob, Prompt, job_of_this_process, time_batches


def main() -> None:
    job = job_of_this_process()
    generator = ctranslate2.Generator(
        job.converted, device="cpu", inter_threads=1, intra_threads=job.threads, compute_type="int8"
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    engine = f"CTranslate2 {ctranslate2.__version__}, int8"
    time_batches(job, engine, lambda batch: decode(generator, tokenizer, batch, job))


def decode(
    generator: ctranslate2.Generator, tokenizer: PreTrainedTokenizerBase, batch: list[Prompt], job: DecodingJob
) -> list[list[int]]:
    """Greedy or beams."""
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt.ids) for prompt in batch],
        max_length=job.new_tokens, min_length=job.new_tokens, end_token=job.end_ids,
        beam_size=job.beams, sampling_topk=1, include_prompt_in_result=False,
    )  # fmt: skip
    return [result.sequences_ids[0] for result in results]


if __name__ == "__main__":
    main()
