"""TRL's SFTTrainer made for a set of rows, timed: that is its templates, masks and tokenizing, since the model is
tiny and made before. Argument: a job (job.py), with options of SFTConfig."""

import tempfile
import time

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from job import Job, answer, job_of_this_process, read_rows


def main() -> None:
    job = job_of_this_process()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    rows = datasets.Dataset.from_list(conversations(job))
    with tempfile.TemporaryDirectory() as work:
        options = SFTConfig(work, use_cpu=True, bf16=False, max_length=job.max_length, **job.options)
        began = time.perf_counter()
        trainer = SFTTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - began
        prepared = trainer.train_dataset
        answer(seconds=seconds, examples=len(prepared), tokens=sum(map(len, prepared["input_ids"])))


def conversations(job: Job) -> list[dict[str, list[dict[str, str]]]]:
    """Of prompts and completions, so that the completion alone is learned."""
    made = []
    for row in read_rows(job):
        user = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        prompt, completion = {"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}
        made.append({"prompt": [prompt], "completion": [completion]})
    return made


if __name__ == "__main__":
    main()
