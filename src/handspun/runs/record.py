"""run.json: what was trained on what, with what, by which command, and what came of it."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig, option_name
from handspun.config.rows_in_memory import IN_MEMORY
from handspun.data.dataset import Dataset
from handspun.data.examples import DataReport, learned_tokens_of
from handspun.files import from_json, output_errors, read_json_object, to_json, write_json
from handspun.preflight.checks import Preflight
from handspun.runs.incidents import Incident, incident_facts, incidents_from
from handspun.training.loop import Evaluation
from handspun.training.memory import Plan

_PACKAGES = ["handspun", "torch", "transformers", "tokenizers", "peft", "datasets", "safetensors"]


RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """A set of rows. sha256: of their values; tokens: of all examples."""

    sha256: str
    examples: int
    tokens: int
    learned_tokens: int
    rows: DataReport


@dataclass(frozen=True)
class RowSets:
    """The rows of a run."""

    train: RowSet
    held_out: RowSet | None = None

    @property
    def by_name(self) -> dict[str, RowSet]:
        """The sets that there are, by their names in the file."""
        return {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine, and what ran on it."""

    machine: str
    cores: int | None
    memory_bytes: int | None = None
    system: str
    python: str
    command: list[str]
    versions: dict[str, str]
    kernels: str | None = None
    """Of int8: the CPU's instruction set, or "reference"."""


@dataclass(frozen=True)
class Resumed:
    """A time at which the run resumed. changes: what may affect the rounding, [before, since then]."""

    step: int
    at: str
    changes: dict[str, list[Any]]


INCIDENTS = {"read": incidents_from, "write": lambda incidents: [incident_facts(one) for one in incidents]}
"""Metadata of a field of incidents."""


@dataclass(kw_only=True)
class RunRecord:
    """run.json. The stages of a run fill it in; what is None is not in the file."""

    started: str
    config: dict[str, Any]
    """The options, with the learning rate and the longest example that apply."""
    given: dict[str, Any] = field(default_factory=dict)
    """The options that differ from their defaults."""
    data: RowSets
    environment: Environment
    fingerprints: dict[str, str] | None = None
    """Of model, tokenizer and chat template."""
    resumed: list[Resumed] | None = None
    dtype: str | None = None
    """Of the matmuls."""
    processes: int | None = None
    threads: int | None = None
    preflight: Preflight | None = None
    plan: Plan | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    status: str | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list, metadata=INCIDENTS)
    checkpoints: list[str] = field(default_factory=list)
    best_checkpoint: str | None = None

    def write(self, folder: Path) -> None:
        """Replace run.json. Raises OutputError."""
        with output_errors(folder / RUN_FILE):
            write_json(folder / RUN_FILE, {**record_json(self), "best_checkpoint": self.best_checkpoint})


def record_json(record: RunRecord) -> dict[str, Any]:
    """Return a record as JSON's types, without what is not known."""
    return {name: value for name, value in to_json(record).items() if value is not None}


def read_record(folder: Path) -> RunRecord | str:
    """Return the record in run.json, or what is wrong with the file, in words."""
    try:
        value = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    try:
        return from_json(RunRecord, value)
    except ValueError as error:
        return str(error)


def is_finished(folder: Path) -> bool:
    """Return whether the folder's run came to its end."""
    return (read_json_object(folder / RUN_FILE) or {}).get("status") == "finished"


def environment() -> Environment:
    """Return what a reader of the run's numbers needs to know."""
    import torch  # here: what only reads a run's record needs none of it

    from handspun.kernels import kernels_for

    return Environment(
        machine=", ".join([cpu_name(), *gpu_names()]),
        cores=os.cpu_count(),
        memory_bytes=total_memory(),
        system=platform.platform(),
        python=platform.python_version(),
        command=sys.argv,
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        kernels=kernels_for(torch.device("cpu")).name,
    )


def environment_lines() -> list[str]:
    """Return the versions, the machine, and the kernels that int8 would use, a line each."""
    from handspun.kernels.native import supported_sets  # imports torch

    found = environment()
    others = [name for name in supported_sets() if name != found.kernels]
    also = f" (this CPU also has {', '.join(others)})" if others else ""
    facts = {**found.versions, "Python": found.python, "system": found.system, "CPU": found.machine}
    facts |= {"cores": str(found.cores), "int8 kernels": f"{found.kernels}{also}"}
    return [f"{name:<13} {value}" for name, value in facts.items()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # of an extra
        return None


def cpu_name() -> str:
    """Return the processor's name, such as `AMD EPYC 7B13`."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that PyTorch can use."""
    import torch  # here: what only reads a run's record needs none of it

    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]


def total_memory() -> int | None:
    """Return bytes of memory in the machine; None if the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def current_memory() -> int | None:
    """Return bytes that this process holds in memory or on its GPU; None if it is unknown."""
    if (gpu := _gpu_in_use()) is not None:
        return int(gpu.memory_reserved())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int | None:
    """Return the most bytes that this process has held in memory or on its GPU; None if it is unknown."""
    if (gpu := _gpu_in_use()) is not None:
        return int(gpu.max_memory_reserved())
    try:
        import resource
    except ImportError:  # Windows
        return None
    if (peak := _peak_on_linux()) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_on_linux() -> int | None:
    # Not ru_maxrss: a program starts with that of the one that started it.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _gpu_in_use() -> Any:
    """Return torch.cuda once PyTorch uses a GPU; else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


_OF_THE_FOLDER = {"overwrite", "dry_run", "resume"}
"""Options about an earlier run, not about this one."""


def options_given(config: TrainConfig) -> dict[str, Any]:
    """Return the options that differ from their defaults, in the order of config/training.py."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _OF_THE_FOLDER and getattr(config, field.name) != field.default
    }


def command(given: Mapping[str, Any], *, processes: int = 1) -> str:
    """Return `handspun train ...` with these options, one per line for a shell; torchrun for several processes.

    Rows that a Python program gave are named as files that stand for them.
    """
    start = "handspun train"
    if processes > 1:
        start = f"torchrun --standalone --nproc-per-node {processes} -m {start}"
    in_memory = {name: value for name, value in given.items() if IN_MEMORY.fullmatch(str(value))}
    given = {name: f"{name}.jsonl" if name in in_memory else value for name, value in given.items()}
    notes = [f"# {name}.jsonl: the {rows}, which a Python program gave" for name, rows in in_memory.items()]
    options = [shlex.join(words) for name, value in given.items() for words in _typed(name, value)]
    return "\n".join([" \\\n    ".join([start, *options]), *notes])


def option_words(given: Mapping[str, Any]) -> list[str]:
    """Return options as the words of a command."""
    return [word for name, value in given.items() for words in _typed(name, value) for word in words]


def _typed(name: str, value: Any) -> list[list[str]]:
    option = option_name(name)
    if value is True:
        return [[option]]
    if value is False:
        return [["--no-" + option.removeprefix("--")]]
    if isinstance(value, list | tuple):
        return [part for one in value for part in _typed(name, one)]
    if isinstance(value, Mapping):
        return _typed(name, json.dumps(value, ensure_ascii=False))
    is_like_one = str(value).startswith("-")
    return [[f"{option}={value}"] if is_like_one else [option, str(value)]]


def new_record(config: TrainConfig, training: Dataset, held_out: Dataset | None, max_length: int) -> RunRecord:
    """Return what is known before the model is loaded."""
    return RunRecord(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        config={**asdict(config), "learning_rate": config.peak_learning_rate, "max_length": max_length},
        given=options_given(config),
        data=RowSets(_row_set(training), _row_set(held_out) if held_out else None),
        environment=environment(),
    )


def _row_set(dataset: Dataset) -> RowSet:
    return RowSet(
        sha256=dataset.fingerprint,
        examples=len(dataset.examples),
        tokens=len(dataset.examples.input_ids),
        learned_tokens=learned_tokens_of(dataset.examples),
        rows=dataset.account,
    )
