"""Held-out loss of saved weights by Handspun's evaluation, padded, in float32.

Arguments: the model's folder, rows (json), longest example in tokens, threads.
"""

import json
import sys

import torch

from handspun.config import TrainConfig
from handspun.data.examples import build_examples
from handspun.data.rows import Row
from handspun.models.load import load
from handspun.training.loop import evaluate
from handspun.training.objectives import PaddedRunner


def main() -> None:
    folder, rows_file, max_length, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with open(rows_file, encoding="utf-8") as file:
        rows = [Row("held out", number, row) for number, row in enumerate(json.load(file), start=1)]
    chat = load(folder, weights="float32")
    examples, _ = build_examples(rows, chat.template, max_length=int(max_length))
    execution = PaddedRunner(chat.model, torch.float32, chat.tokenizer.pad_token_id or 0)
    loss, learned_tokens = evaluate(chat.model, execution, examples, max_tokens=TrainConfig().max_tokens)
    print(json.dumps({"loss": loss, "learned_tokens": learned_tokens}))


if __name__ == "__main__":
    main()
