"""Decoding with OpenVINO GenAI in int8, timed. Argument: a job (decoding.py) with a converted model."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from decoding import DecodingJob, Prompt, job_of_this_process, measure

NO_TOKEN = 10_000_000


class Clock(openvino_genai.StreamerBase):
    """Told of each token."""

    def __init__(self, came: Callable[[], None]) -> None:
        super().__init__()
        self.came = came

    def write(self, token: Any) -> openvino_genai.StreamingStatus:  # noqa: ARG002
        """Passes on that a token has come."""
        self.came()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def main() -> None:
    job = job_of_this_process()
    pipeline = openvino_genai.LLMPipeline(job.converted, "CPU", INFERENCE_NUM_THREADS=job.threads)
    measure(
        job,
        lambda batch: decode(pipeline, batch, job),
        lambda prompt, came: decode(pipeline, [prompt], job, streamer=Clock(came)),
        engine=f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}",
        weights="int8",
        bytes_a_token=(Path(job.converted) / "openvino_model.bin").stat().st_size,
    )


def decode(
    pipeline: openvino_genai.LLMPipeline, batch: list[Prompt], job: DecodingJob, **options: Any
) -> list[list[int]]:
    """Greedy or beams, padded on the left."""
    length = max(len(prompt.ids) for prompt in batch)
    input_ids = np.full((len(batch), length), job.end_ids[0])
    mask = np.zeros_like(input_ids)
    for row, prompt in enumerate(batch):
        input_ids[row, length - len(prompt.ids) :] = prompt.ids
        mask[row, length - len(prompt.ids) :] = 1
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(input_ids), openvino.Tensor(mask))
    tokens: list[list[int]] = pipeline.generate(inputs, configuration(job), **options).tokens
    return tokens


def configuration(job: DecodingJob) -> openvino_genai.GenerationConfig:
    """Not that of the model's folder. Its beam search looks at neither min_new_tokens nor ignore_eos, so there the
    only end is a token that there is not; what ends an answer elsewhere is then a token like others."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = job.new_tokens
    config.num_beams = job.beams
    config.ignore_eos = True
    if job.beams == 1:
        config.min_new_tokens = job.new_tokens
        config.stop_token_ids = set(job.end_ids)
    else:
        config.set_eos_token_id(NO_TOKEN)
    return config


if __name__ == "__main__":
    main()
