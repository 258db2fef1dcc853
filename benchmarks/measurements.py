"""What the benchmarks share: rows, processes that measure, figures saved as they come, tables and plots."""

import csv
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handspun.models.embedded import EMBEDDED_NAME, embedded_folder
from handspun.runs.record import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"
DEMO_ROWS = HERE.parent / "src" / "handspun" / "demo" / "demo.csv"

Row = dict[str, str]
Run = dict[str, Any]


@dataclass
class Results:
    """Figures under names, each name with its runs in order, in a JSON file that is written as they come."""

    path: Path
    header: dict[str, Any]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def add(self, name: str, run: Run) -> Run:
        """Appends a run and writes the file; a reader never sees half of it."""
        self.runs.setdefault(name, []).append(run)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self.header, "runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
        return run

    def of(self, name: str) -> list[Run]:
        """The runs of a name so far."""
        return self.runs.get(name, [])


def open_results(name: str, settings: dict[str, Any], *, fresh: bool, folder: Path = RESULTS) -> Results:
    """The results that are there already, to go on from, or none if there are none or `fresh`.

    SystemExit if they were taken with other settings or versions, or on another machine: they are not mixed.
    """
    here, names = environment(), ("machine", "cores", "python", "versions")
    header = {name: getattr(here, name) for name in names} | {"settings": settings}
    header = json.loads(json.dumps(header))
    results = Results(folder / f"{name}.json", {**header, "command": command()})
    folder.mkdir(parents=True, exist_ok=True)
    if fresh or not results.path.exists():
        return results
    saved = json.loads(results.path.read_text(encoding="utf-8"))
    if differing := [key for key in header if saved.get(key) != header[key]]:
        shown = "\n".join(f"  {key}: {saved.get(key)} there, {header[key]} now" for key in differing)
        raise SystemExit(f"{results.path} holds other measurements:\n{shown}\n--fresh starts over.")
    results.runs = saved["runs"]
    return results


def command() -> str:
    """This process's command line, with the names of files alone."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])])


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).exists() else argument


@dataclass(frozen=True)
class Contender:
    """A script of benchmarks/contenders, and what it alone is asked for (job.py, decoding.py)."""

    script: str
    job: dict[str, Any] = field(default_factory=dict)
    environment: str = ".venv-peers"
    """Of a peer; Handspun runs in the environment of this process."""

    @property
    def python(self) -> Path:
        """That of its environment."""
        if self.script.startswith("handspun"):
            return Path(sys.executable)
        return HERE.parent / self.environment / "bin" / "python"


TRL_AT_ITS_BEST = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
"""The fastest options of SFTTrainer that were found on a CPU."""


def chosen(contenders: dict[str, Contender], only: list[str] | None) -> dict[str, Contender]:
    """The contenders that are asked for and whose environment is there."""
    if unknown := set(only or []) - set(contenders):
        raise SystemExit(f"--only: there is no {', '.join(unknown)}; there are {', '.join(contenders)}.")
    asked = {name: contender for name, contender in contenders.items() if not only or name in only}
    for name, contender in asked.items():
        if not contender.python.exists():
            made_by = f"`make {contender.environment}/.installed` makes it"
            print(f"{name} is left out: {contender.python} is not there; {made_by}")
    return {name: contender for name, contender in asked.items() if contender.python.exists()}


def measure(contender: Contender, **job: Any) -> Run:
    """One process of a contender: the figures that it prints."""
    whole = {**job, **contender.job}
    done = run_process([contender.python, HERE / "contenders" / contender.script, json.dumps(whole)])
    return dict(json.loads(done.strip().splitlines()[-1]))


def run_process(command: Sequence[str | Path]) -> str:
    """What a process prints; SystemExit with its last lines if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def model_folder(name: str) -> str:
    """The folder of a model; the embedded one is made where it is not there yet."""
    return str(embedded_folder()) if name == EMBEDDED_NAME else name


def read_rows(file: Path) -> list[Row]:
    """Rows of a csv file in the Alpaca format; those without an output are left out."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["output"].strip()]


def draw(rows: Sequence[Row], *counts: int, seed: int = 0) -> list[list[Row]]:
    """So many rows for each count, drawn with the seed, none of them twice."""
    drawn = iter(random.Random(seed).sample(rows, sum(counts)))
    return [[next(drawn) for _ in range(count)] for count in counts]


def write_rows(file: Path, rows: Sequence[Row]) -> Path:
    """A csv file of the three Alpaca columns."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, ["instruction", "input", "output"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def rows_file(folder: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A json file of rows, for the contenders."""
    file = Path(folder) / f"{name}.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


def with_range(values: Sequence[float], digits: int = 2) -> str:
    """`2.19 (2.16-2.22)`: the median, with the lowest and highest where there are several."""
    median = f"{statistics.median(values):.{digits}f}"
    return f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else median


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def axes_of_a_plot(x: str, y: str) -> tuple[Any, Any]:
    """An empty figure and its axes, with a light grid."""
    from matplotlib.figure import Figure  # only plots need it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_plot(figure: Any, file: Path) -> None:
    """An SVG file, the same for the same figures."""
    import matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "handspun", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    print(f"plot: {file}")
