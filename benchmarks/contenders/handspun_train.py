"""One epoch with Handspun, timed. Arguments: model, rows (json), mode, batch size.

mode: "packed", "padded" or "packed-bfloat16"."""

import json
import resource
import sys
import time

import torch

from handspun.training.allocator import keep_freed_memory

model_name, rows_file, mode, batch_size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
batching, _, short = mode.partition("-")
keep_freed_memory()
torch.set_num_threads(2)

from handspun.config import TrainConfig  # noqa: E402  (the allocator first)
from handspun.data.batches import epoch_order  # noqa: E402
from handspun.data.examples import build_examples  # noqa: E402
from handspun.data.rows import Row  # noqa: E402
from handspun.models.load import load  # noqa: E402
from handspun.training.execution import execution_of  # noqa: E402
from handspun.training.loop import Loop, Step, start, train  # noqa: E402

with open(rows_file, encoding="utf-8") as file:
    rows = json.load(file)
chat = load(model_name, dtype="float32")
made, _ = build_examples([Row("rows", i, row) for i, row in enumerate(rows)], chat.template, max_length=512)
config = TrainConfig(
    num_epochs=1,
    batch_size=batch_size,
    learning_rate=1e-5,
    lr_schedule="linear",
    warmup_ratio=0.0,
    batching=batching,  # type: ignore[arg-type]
)
# Laid so that this run's seeded order is the order of the file, which the others are given too.
examples = [made[0]] * len(made)
for place, example in zip(epoch_order(len(made), seed=config.seed, epoch=1), made, strict=True):
    examples[place] = example
with execution_of(
    chat.model,
    config,
    examples,
    dtype=torch.bfloat16 if short else torch.float32,
    pad_token_id=chat.tokenizer.pad_token_id or 0,
    notice=str,
) as execution:
    loop = Loop(config=config, examples=examples, execution=execution)
    state = start(chat.model, config)
    began = time.perf_counter()
    steps = [event for event in train(loop, state) if isinstance(event, Step)]
    seconds = time.perf_counter() - began
print(
    json.dumps(
        {
            "seconds": seconds,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "learned_tokens": sum(step.learned_tokens for step in steps),
            "losses": [step.loss for step in steps],
        }
    )
)
