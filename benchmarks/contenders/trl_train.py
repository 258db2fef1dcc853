"""One epoch with TRL's SFTTrainer, timed. Arguments: model, rows (json), mode, batch size.

mode: "default"; "best" is the fastest configuration that was found on a CPU: no gradient checkpointing, rows
grouped by length; "best-bfloat16", the same in mixed precision.
"""

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_name, rows_file, mode, batch_size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(2)
with open(rows_file, encoding="utf-8") as file:
    rows = json.load(file)
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": r["instruction"] + ("\n" + r["input"] if r["input"] else "")}],
            "completion": [{"role": "assistant", "content": r["output"]}],
        }
        for r in rows
    ]
)
options = {
    "output_dir": tempfile.mkdtemp(),
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": batch_size,
    "num_train_epochs": 1,
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "max_length": 512,
    "disable_tqdm": True,
}
if mode.startswith("best"):
    bf16 = mode == "best-bfloat16"
    options |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length", "bf16": bf16}
losses: list[float] = []


class Losses(TrainerCallback):
    """Notes the loss of every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        if logs and "loss" in logs:
            losses.append(float(logs["loss"]))


trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32),
    args=SFTConfig(**options),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(model_name),
    callbacks=[Losses()],
)
began = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"seconds": seconds, "peak_gb": peak, "losses": losses}))
