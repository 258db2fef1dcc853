"""Decoding with transformers' `generate` in float32, timed. Argument: a job (decoding.py)."""

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from decoding import DecodingJob, Prompt, job_of_this_process, time_batches


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    engine = f"transformers {transformers.__version__}, float32"
    time_batches(job, engine, lambda batch: decode(model, batch, job))


def decode(model: PreTrainedModel, batch: list[Prompt], job: DecodingJob) -> list[list[int]]:
    """Greedy or beams, padded on the left."""
    length = max(len(prompt.ids) for prompt in batch)
    padding = [length - len(prompt.ids) for prompt in batch]
    pad = job.end_ids[0]
    input_ids = torch.tensor([[pad] * n + prompt.ids for n, prompt in zip(padding, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
    output = model.generate(
        input_ids, attention_mask=mask, do_sample=False, num_beams=job.beams, max_new_tokens=job.new_tokens,
        min_new_tokens=job.new_tokens, eos_token_id=job.end_ids, pad_token_id=pad,
    )  # fmt: skip
    return output[:, length:].tolist()


if __name__ == "__main__":
    main()
