"""What the peers share: the rows as token ids with labels, options that all get, and the clock."""

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from job import Job, answer, read_rows

IGNORED = -100


def tokenized(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """input_ids and labels of each row, through the chat template; learned are answers with their end of turn.

    What the template writes after the last end of turn (a newline) is left out, as Handspun leaves it out.
    """
    return [_tokenized(row, tokenizer, job.max_length) for row in read_rows(job)]


def _tokenized(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    messages = row.get("messages") or _messages(row)
    input_ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = messages[:turn], messages[: turn + 1]
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(after, tokenize=False)).rstrip("\n")
        assert whole.startswith(prompt)
        assert prompt.startswith(done)
        prompt_ids = tokenizer(prompt[len(done) :], add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        input_ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
        done = whole
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def _messages(row: dict[str, str]) -> list[dict[str, str]]:
    user = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    return [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]


def options_of(job: Job, output_dir: str) -> dict[str, Any]:
    """Options of TrainingArguments and SFTConfig, the job's own last."""
    return {
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": job.dtype == "bfloat16",
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.lr_schedule,
        "warmup_steps": job.warmup_ratio,  # below 1 it is a share
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **job.options,
    }


class Clock(TrainerCallback):
    """Losses, and seconds from the beginning of the first step to the end of the last, without those of saving."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.began = self.paused = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Notes the beginning of the first step."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Notes the end of the step, and saves the weights where the job asks for it."""
        now = time.perf_counter()
        self.ends.append(now - self.began - self.paused)
        if state.global_step in self.job.save_at:
            folder = Path(self.job.save_dir) / f"step-{state.global_step}"
            kwargs["model"].save_pretrained(folder)
            kwargs["processing_class"].save_pretrained(folder)
            self.paused += time.perf_counter() - now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Notes the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def answer_of(clock: Clock, examples: list[dict[str, list[int]]]) -> None:
    """Prints what was measured."""
    answer(
        seconds=clock.ends[-1],
        step_seconds=[end - begin for begin, end in zip([0.0, *clock.ends], clock.ends, strict=False)],
        tokens=sum(len(example["input_ids"]) for example in examples),
        # The first token is never learned: nothing predicts it.
        learned_tokens=sum(label != IGNORED for example in examples for label in example["labels"][1:]),
        losses=clock.losses,
    )
