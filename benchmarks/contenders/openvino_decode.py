"""Decoding with OpenVINO GenAI in int8, timed. Argument: a job (decoding.py) with a converted model."""

import importlib.metadata

import numpy as np
import openvino
import openvino_genai

from decoding import DecodingJob, Prompt, job_of_this_process, time_batches


def main() -> None:
    job = job_of_this_process()
    pipeline = openvino_genai.LLMPipeline(job.converted, "CPU", INFERENCE_NUM_THREADS=job.threads)
    engine = f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}, int8"
    time_batches(job, engine, lambda batch: decode(pipeline, batch, job))


def decode(pipeline: openvino_genai.LLMPipeline, batch: list[Prompt], job: DecodingJob) -> list[list[int]]:
    """Greedy or beams, padded on the left."""
    length = max(len(prompt.ids) for prompt in batch)
    input_ids = np.full((len(batch), length), job.end_ids[0])
    mask = np.zeros_like(input_ids)
    for row, prompt in enumerate(batch):
        input_ids[row, length - len(prompt.ids) :] = prompt.ids
        mask[row, length - len(prompt.ids) :] = 1
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(input_ids), openvino.Tensor(mask))
    tokens: list[list[int]] = pipeline.generate(inputs, configuration(job)).tokens
    return tokens


def configuration(job: DecodingJob) -> openvino_genai.GenerationConfig:
    """Not that of the model's folder."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = job.new_tokens
    config.ignore_eos = True
    config.stop_token_ids = set(job.end_ids)
    config.num_beams = job.beams
    return config


if __name__ == "__main__":
    main()
