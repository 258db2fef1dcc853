"""run.json: what was trained on what, with what, by which command, and what came of it."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig, option_name
from handspun.data.dataset import Dataset
from handspun.data.examples import learned_tokens_of
from handspun.files import output_errors, write_json

_PACKAGES = ["handspun", "torch", "transformers", "tokenizers", "peft", "datasets", "safetensors"]


def environment() -> dict[str, object]:
    """Return facts that a reader of the run's numbers needs."""
    return {
        "machine": ", ".join([cpu_name(), *gpu_names()]),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "command": sys.argv,
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    """Return `handspun train ...` with these options, one per line for a shell; torchrun for several processes."""
    start = "handspun train"
    if processes > 1:
        start = f"torchrun --standalone --nproc-per-node {processes} -m {start}"
    return " \\\n    ".join([start, *(option for name, value in given.items() for option in _typed(name, value))])


def _typed(name: str, value: Any) -> list[str]:
    option = option_name(name)
    if value is True:
        return [option]
    if value is False:
        return ["--no-" + option.removeprefix("--")]
    if isinstance(value, list | tuple):
        return [part for one in value for part in _typed(name, one)]
    if isinstance(value, Mapping):
        return _typed(name, json.dumps(value, ensure_ascii=False))
    is_like_one = str(value).startswith("-")
    return [shlex.join([f"{option}={value}"] if is_like_one else [option, str(value)])]


RUN_FILE = "run.json"


def run_facts(config: TrainConfig, training: Dataset, held_out: Dataset | None, max_length: int) -> dict[str, Any]:
    """Return what is known before the model is loaded."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {
            **asdict(config),
            "learning_rate": config.peak_learning_rate,
            "max_length": max_length,
        },
        "given": options_given(config),
        "data": {
            "train": _set_facts(training),
            "held_out": _set_facts(held_out) if held_out else None,
        },
        "environment": environment(),
    }


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Replace run.json. Raises OutputError."""
    with output_errors(folder / RUN_FILE):
        write_json(folder / RUN_FILE, facts)


def _set_facts(examples: Dataset) -> dict[str, Any]:
    return {
        "sha256": examples.fingerprint,
        "examples": len(examples.examples),
        "tokens": len(examples.examples.input_ids),
        "learned_tokens": learned_tokens_of(examples.examples),
        "rows": asdict(examples.account),
    }
