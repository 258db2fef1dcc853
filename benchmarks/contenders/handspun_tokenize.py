"""A csv file to examples, timed: reading, templates, masks, account. Argument: a job (job.py) whose rows are the
csv file and whose save_dir is the cache's folder."""

import time
from pathlib import Path

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import ExampleCache, load_splits
from handspun.models.load import load_tokenizer, model_source
from job import answer, job_of_this_process


def main() -> None:
    job = job_of_this_process()
    template = ChatTemplate(load_tokenizer(model_source(job.model)))
    cache = ExampleCache(Path(job.save_dir))
    began = time.perf_counter()
    made, _ = load_splits(DataConfig(data=job.rows), template, max_length=job.max_length, cache=cache)
    seconds = time.perf_counter() - began
    answer(seconds=seconds, examples=len(made.examples), tokens=len(made.examples.input_ids))


if __name__ == "__main__":
    main()
