"""Decoding with transformers' `generate` in float32, timed. Argument: a job (decoding.py)."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from decoding import DecodingJob, Prompt, job_of_this_process, measure, weights_a_token


class Clock(BaseStreamer):
    """Told of the prompt first, and then of each token."""

    def __init__(self, came: Callable[[], None]) -> None:
        self.came, self.is_prompt = came, True

    def put(self, value: Any) -> None:  # noqa: ARG002
        """Passes on that a token has come."""
        if not self.is_prompt:
            self.came()
        self.is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    measure(
        job,
        lambda batch: decode(model, batch, job),
        lambda prompt, came: decode(model, [prompt], job, streamer=Clock(came)),
        engine=f"transformers {transformers.__version__}",
        weights="float32",
        bytes_a_token=4 * weights_a_token(model),
    )


def decode(model: PreTrainedModel, batch: list[Prompt], job: DecodingJob, **options: Any) -> list[list[int]]:
    """Greedy or beams, padded on the left."""
    length = max(len(prompt.ids) for prompt in batch)
    padding = [length - len(prompt.ids) for prompt in batch]
    pad = job.end_ids[0]
    input_ids = torch.tensor([[pad] * n + prompt.ids for n, prompt in zip(padding, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
    output = model.generate(
        input_ids, attention_mask=mask, do_sample=False, num_beams=job.beams, max_new_tokens=job.new_tokens,
        min_new_tokens=job.new_tokens, eos_token_id=job.end_ids, pad_token_id=pad, **options,
    )  # fmt: skip
    return output[:, length:].tolist()


if __name__ == "__main__":
    main()
