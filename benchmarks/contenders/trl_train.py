"""One epoch with TRL's SFTTrainer, timed. Argument: a job (job.py), with options of SFTConfig."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from job import job_of_this_process
from peers import Clock, answer_of, options_of, tokenized


def main() -> None:
    job = job_of_this_process()
    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    examples, clock = tokenized(job, tokenizer), Clock(job)
    # Frozen weights need no float32: in the matmuls' type, steps were 2 to 5 % faster. Adapters stay float32.
    weights = getattr(torch, job.dtype) if job.lora else torch.float32
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as work:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model, dtype=weights),
            args=SFTConfig(**options_of(job, work), max_length=job.max_length),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=lora if job.lora else None,
            callbacks=[clock],
        )
        trainer.train()
    answer_of(clock, examples)


if __name__ == "__main__":
    main()
