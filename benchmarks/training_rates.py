"""The rates by which a run's time is predicted (preflight/time_estimate.py), from measured figures.

    python benchmarks/training_rates.py --data train.csv --model FOLDER

Reads what benchmarks/train.py left in benchmarks/results/ for the embedded model, and for the one that is given,
whose folder must have the name that it had then; --data is the file that the rows were drawn from. What is printed
are the operations of the same rows over the seconds of their steps and the threads: nothing is trained.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from handspun.config import TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import load_splits
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import load_tokenizer, model_source
from handspun.preflight.time_estimate import operations
from handspun.runs.train import shapes
from handspun.training.memory import make_plan
from measurements import RESULTS, draw, read_rows, rows_file, table

FORMS: dict[str, dict[str, Any]] = {
    "Handspun": {"dtype": "float32"},
    "Handspun, bfloat16": {"dtype": "bfloat16"},
    "Handspun, int8 base": {"dtype": "float32", "base_weights": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the csv file that the measured rows were drawn from"
    )
    parser.add_argument("--model", action="append", default=[EMBEDDED_NAME], help="a model's folder")
    arguments = parser.parse_args()
    lines = [
        line
        for model in arguments.model
        for file in sorted(RESULTS.glob(f"train-*-{Path(model).name}-{arguments.data.stem}-*.json"))
        for line in rates(json.loads(file.read_text(encoding="utf-8")), model, arguments.data)
    ]
    print(table(["model", "", "", "operations an epoch", "seconds", "operations a second and thread"], lines))


def rates(results: dict[str, Any], model: str, data: Path) -> list[list[str]]:
    """A line for each of Handspun's forms that was measured."""
    settings, lines = results["settings"], []
    source = model_source(model)
    with TemporaryDirectory() as work:
        [rows] = draw(read_rows(data), settings["rows"])
        file = rows_file(Path(work), "rows", rows)
        for name in FORMS.keys() & results["runs"].keys():
            config = TrainConfig(
                model=model,
                data=str(file),
                lora=settings["lora"],
                batch_size=settings["batch_size"],
                num_epochs=1,
                **FORMS[name],
            )
            template = ChatTemplate(load_tokenizer(source))
            examples, _ = load_splits(config, template, max_length=settings["max_length"])
            if len(examples.examples.input_ids) != results["runs"][name][0]["tokens"]:
                raise SystemExit(f"{data} has not the rows that were measured: expected as many tokens")
            shape = partial(shapes, source)(config)
            done = operations(shape, make_plan(shape, examples.examples, config), examples.examples, config)
            for run in results["runs"][name]:
                seconds = sum(run["step_seconds"])
                rate = done / seconds / settings["threads"]
                form = "LoRA" if settings["lora"] else "full"
                lines.append(
                    [Path(model).name, form, name, f"{done:.3g}", f"{seconds:.1f}", f"{rate / 1e9:.0f}e9"]
                )
    return lines


if __name__ == "__main__":
    main()
