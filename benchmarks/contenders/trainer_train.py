"""One epoch with transformers' Trainer, timed. Argument: a job (job.py), with options of TrainingArguments."""

import tempfile

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from job import job_of_this_process
from peers import Clock, answer_of, options_of, tokenized


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    examples, clock = tokenized(job, tokenizer), Clock(job)
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
            args=TrainingArguments(**options_of(job, work)),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[clock],
        )
        trainer.train()
    answer_of(clock, examples)


if __name__ == "__main__":
    main()
