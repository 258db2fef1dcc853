"""The rates by which a run's time is predicted (preflight/time_estimate.py), measured.

    python benchmarks/training_rates.py --data train.csv [--model FOLDER] [--rows 32] [--turns 3]

Optimizer steps of each form of training over the same rows, one thread, the forms taking turns. A rate is the
operations of the rows over the processor time of the steps, so that others on the machine disturb less; printed is
the median, with the lowest and highest. Each turn is a process of its own, and its first step is not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from handspun.config import TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import load_splits
from handspun.kernels.allocator import disable_malloc_trim
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.int8 import quantize_base
from handspun.models.load import load
from handspun.models.lora import add_lora
from handspun.preflight.time_estimate import operations
from handspun.training.batching import batches
from handspun.training.loop import Loop, start, train_step
from handspun.training.memory import make_plan
from handspun.training.runner import select_runner
from measurements import DEMO_ROWS, draw, model_folder, read_rows, rows_file, run_process, table, with_range

FORMS: dict[str, dict[str, Any]] = {
    "full, float32": {"dtype": "float32"},
    "full, bfloat16": {"dtype": "bfloat16"},
    "LoRA, float32": {"dtype": "float32", "lora": True},
    "LoRA, bfloat16": {"dtype": "bfloat16", "lora": True},
    "LoRA on int8": {"dtype": "float32", "lora": True, "base_weights": "int8"},
}


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] in FORMS:
        print(json.dumps(rate(*sys.argv[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as work:
        [rows] = draw(read_rows(arguments.data), arguments.rows)
        file = rows_file(work, "rows", rows)
        for _ in range(arguments.turns):
            for form, measured in rates.items():
                command = [sys.executable, __file__, form, model_folder(arguments.model), file]
                measured.append(json.loads(run_process(command)) / 1e9)
                print(f"{form}: {measured[-1]:.1f}e9", flush=True)
    lines = [[form, with_range(measured, digits=0)] for form, measured in rates.items()]
    print(table(["", "1e9 operations a second and thread"], lines))


def rate(form: str, model_name: str, rows: str) -> float:
    """Return the operations per second of processor time over the rows, in batches of 8, on one thread."""
    torch.set_num_threads(1)
    disable_malloc_trim()  # as runs do
    config = TrainConfig(model=model_name, data=rows, num_epochs=1, eval_ratio=0.0, **FORMS[form])
    chat = load(model_name, device="cpu", weights="float32")
    model = chat.model
    if config.lora:
        model = add_lora(model, model_name, rank=config.lora_rank, alpha=config.lora_alpha, dropout=0.0)
    if config.base_weights == "int8":
        quantize_base(model)
    training, _ = load_splits(config, ChatTemplate(chat.tokenizer), max_length=512)
    examples = training.examples
    done = operations(model, make_plan(model, examples, config), examples, config)
    model.train()
    with select_runner(model, config, examples, dtype=getattr(torch, config.dtype), pad_token_id=0) as runner:
        loop, state = Loop(config=config, examples=examples, runner=runner), start(model, config)
        every = list(batches(examples, list(range(len(examples))), config.batch_size))
        for batch in [every[0], *every]:
            if batch is every[0]:  # once more: the first step touches its memory for the first time
                began = time.process_time()
            for _ in train_step(loop, state, batch, epoch=1):
                pass
    return float(done / (time.process_time() - began))


if __name__ == "__main__":
    main()
