"""How the cost of training grows with rows, with length, with batch and with model.

    python benchmarks/scaling.py --data train.csv [--models smollm2-135m FOLDER] [--dtype bfloat16] [--fresh]
    python benchmarks/scaling.py --data train.csv --tables "tokens a row" --lengths 1024 --results NAME

Full fine-tuning, every measurement a process of its own, as in train.py; TRL at its best is measured where it
takes little time, and at 1,024 tokens a row, in batches of 2 there, since it keeps all logits. Rows of a length
are joined from shorter ones, questions to questions and answers to answers. Each figure is saved in
benchmarks/results/ as it is measured, and a benchmark that is run again goes on from what is saved; --fresh
starts over.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import build_examples
from handspun.data.rows import Row as DataRow
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import load_tokenizer, model_source
from measurements import (
    DEMO_ROWS,
    TRL_AT_ITS_BEST,
    Contender,
    Results,
    Row,
    Run,
    draw,
    measure,
    model_folder,
    open_results,
    read_rows,
    rows_file,
    table,
)

HANDSPUN, TRL = "Handspun", "TRL at its best"
CONTENDERS = {
    HANDSPUN: Contender("handspun_train.py"),
    TRL: Contender("trl_train.py", {"options": TRL_AT_ITS_BEST}),
}
TABLES = ("rows", "tokens a row", "batch", "model")
LONG = 1024
TOLERANCE = 0.1
"""A row of a length is at most so much shorter or longer, as a share."""


@dataclass(frozen=True)
class Point:
    """One measurement: what is varied, its value, and the rows and batch that go with it."""

    varied: str
    value: str
    model: str
    rows: list[Row]
    batch_size: int
    contenders: tuple[str, ...] = (HANDSPUN, TRL)


def main() -> None:
    arguments = parse()
    name = f"scaling-{arguments.results or arguments.data.stem}-{arguments.dtype}"
    settings = {"data": arguments.data.name} | {
        key: getattr(arguments, key) for key in ("dtype", "threads", "few")
    }
    results = open_results(name, settings, fresh=arguments.fresh)
    points = [point for point in points_of(arguments) if point.varied in arguments.tables]
    with tempfile.TemporaryDirectory() as work:
        for point in points:
            for contender in point.contenders:
                measure_point(results, point, contender, arguments, work)
    for varied in dict.fromkeys(point.varied for point in points):
        print(f"\n{table_of(results, [point for point in points if point.varied == varied])}")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--models", nargs="+", default=[EMBEDDED_NAME], help="the first is used for all tables")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="those to measure")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="tokens a row")
    parser.add_argument("--results", metavar="NAME", help="of the saved figures (default: the data's)")
    parser.add_argument("--few", action="store_true", help="the smallest values only: does it all run?")
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def points_of(arguments: argparse.Namespace) -> Iterator[Point]:
    """Everything that is measured, table by table."""
    first, few = arguments.models[0], arguments.few
    pool = draw_all(read_rows(arguments.data))
    both, ours = (HANDSPUN, TRL), (HANDSPUN,)
    for count in [4] if few else [32, 64, 128]:
        yield Point("rows", str(count), first, pool[:count], 8, both if count < 128 else ours)
    lengths = RowsOfALength(first, pool)
    for length in [128] if few else arguments.lengths:
        batch = 2 if length >= LONG else 8
        rows = lengths.make(length, 2 if few else 2 * batch)
        yield Point("tokens a row", str(length), first, rows, batch, ours if length == 512 else both)
    for size in [2] if few else [1, 4, 8, 16, 32]:
        yield Point(
            "batch", str(size), first, pool[: 4 if few else 32], size, both if size in (2, 8, 32) else ours
        )
    for model in arguments.models:
        yield Point("model", Path(model).name, model, pool[: 4 if few else 32], 8, both)


def draw_all(rows: list[Row]) -> list[Row]:
    """All rows in a seeded order."""
    return draw(rows, len(rows))[0]


class RowsOfALength:
    """Rows of about so many tokens, template included, joined from those of a pool."""

    def __init__(self, model: str, pool: list[Row]) -> None:
        self.template = ChatTemplate(load_tokenizer(model_source(model)))
        self.pool = pool

    def make(self, length: int, count: int) -> list[Row]:
        """Questions joined to questions, answers to answers; SystemExit if the pool does not hold enough."""
        made: list[Row] = []
        parts: list[Row] = []
        for row in self.pool:
            tokens = self.tokens(join([*parts, row]))
            if tokens <= (1 + TOLERANCE) * length:
                parts.append(row)
            if (1 - TOLERANCE) * length <= tokens <= (1 + TOLERANCE) * length:
                made.append(join(parts))
                parts = []
            if len(made) == count:
                return made
        raise SystemExit(f"the data hold too few rows to make {count} of {length} tokens")

    def tokens(self, row: Row) -> int:
        """With the template's own."""
        examples, _ = build_examples([DataRow("rows", 1, dict(row))], self.template, max_length=10**6)
        return len(examples[0])


def join(parts: Sequence[Row]) -> Row:
    """One row that asks and answers what the parts ask and answer."""
    asked = [part["instruction"] + ("\n" + part["input"] if part["input"] else "") for part in parts]
    answered = [part["output"] for part in parts]
    return {"instruction": "\n\n".join(asked), "input": "", "output": "\n\n".join(answered)}


def measure_point(
    results: Results, point: Point, contender: str, arguments: argparse.Namespace, work: str
) -> None:
    """One process, unless its result is there already, or the contender's environment is not."""
    name = run_name(point, contender)
    if results.of(name) or not CONTENDERS[contender].python.exists():
        return
    run = measure(
        CONTENDERS[contender],
        model=model_folder(point.model),
        rows=rows_file(work, "rows", point.rows),
        batch_size=point.batch_size,
        max_length=2048,
        dtype=arguments.dtype,
        threads=arguments.threads,
    )
    results.add(name, run)
    print(f"{name}: {run['tokens'] / run['seconds']:.0f} tokens/s, {run['peak_gb']:.1f} GB", flush=True)


def run_name(point: Point, contender: str) -> str:
    """`batch 8, Handspun`."""
    return f"{point.varied} {point.value}, {contender}"


def table_of(results: Results, points: Sequence[Point]) -> str:
    """A line for each value: seconds a step, rows/s, tokens/s and peak memory, and TRL's where there are any."""
    header = [points[0].varied, "tokens of a row", "s a step", "rows/s", "tokens/s", "peak memory"]
    lines = [line_of(results, point) for point in points]
    return table([*header, "TRL at its best: rows/s", "peak memory", "ratio"], lines)


def line_of(results: Results, point: Point) -> list[str]:
    """The cells of one value."""
    ours, theirs = (results.of(run_name(point, contender)) for contender in (HANDSPUN, TRL))
    count, run = len(point.rows), ours[0]
    cells = [point.value, f"{run['tokens'] / count:.0f}", f"{run['seconds'] / len(run['losses']):.2f}"]
    cells += [f"{count / run['seconds']:.2f}", f"{run['tokens'] / run['seconds']:.0f}", f"{run['peak_gb']:.1f} GB"]
    return cells + (their_cells(theirs[0], run, count) if theirs else ["", "", ""])


def their_cells(theirs: Run, ours: Run, count: int) -> list[str]:
    """TRL's rows/s and memory, and how many times as fast Handspun is."""
    ratio = theirs["seconds"] / ours["seconds"]
    return [f"{count / theirs['seconds']:.2f}", f"{theirs['peak_gb']:.1f} GB", f"{ratio:.2f}"]


if __name__ == "__main__":
    main()
