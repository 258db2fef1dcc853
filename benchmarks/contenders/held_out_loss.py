"""Held-out loss of saved weights by Handspun's evaluation, padded, in float32.

Arguments: rows (json), longest example in tokens, threads, and the models' folders.
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
    rows_file, max_length, threads, *folders = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with open(rows_file, encoding="utf-8") as file:
        rows = [Row("held out", number, row) for number, row in enumerate(json.load(file), start=1)]
    print(json.dumps([held_out_loss(folder, rows, int(max_length)) for folder in folders]))


def held_out_loss(folder: str, rows: list[Row], max_length: int) -> dict[str, float]:
    """The mean over all target tokens, and their number."""
    chat = load(folder, weights="float32")
    examples, _ = build_examples(rows, chat.template, max_length=max_length)
    execution = PaddedRunner(chat.model, torch.float32, chat.tokenizer.pad_token_id or 0)
    loss, learned_tokens = evaluate(chat.model, execution, examples, max_tokens=TrainConfig().max_tokens)
    return {"loss": loss, "learned_tokens": learned_tokens}


if __name__ == "__main__":
    main()
