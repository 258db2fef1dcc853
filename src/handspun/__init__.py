"""Fine-tune small chat models and generate text with them, using a training loop and decoding written by hand.

    import handspun

    run = handspun.train("train.csv", model="Qwen/Qwen2.5-0.5B", lora=True)
    answers = handspun.generate(run.model, ["Tell me a joke."] * 3, temperature=0.7)
    for answer in answers:
        print(answer.text)

The names are imported when they are first used: `import handspun` brings in neither torch nor transformers.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handspun.api import compare, evaluate, export, generate, load, preview, stream, train
    from handspun.config import DataConfig, ExportConfig, GenerationOptions, TrainConfig
    from handspun.decoding.results import GenerationChunk, GenerationResult
    from handspun.errors import (
        ConfigError,
        DataError,
        HandspunError,
        ModelError,
        OutputError,
        StoppedError,
        TemplateError,
        TrainingError,
    )
    from handspun.evaluation.compare import Comparison
    from handspun.evaluation.score import Scores
    from handspun.models.load import ChatModel
    from handspun.preflight.preview_data import Preview
    from handspun.runs.output_dir import TrainedRun

__version__ = "0.1.0"

# The threads of a matmul wait for each other busily, for a millisecond and more by libgomp's default. Where other
# programs use the cores too, that keeps the awaited thread from running: beside six busy programs on two cores, an
# int8 step of SmolLM2 took 218 ms in the median, and takes 9 so. Some 50 microseconds bridge the gaps within a
# step, so nothing is lost on a quiet machine. libgomp reads this when PyTorch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "ChatModel": "models.load",
    "Comparison": "evaluation.compare",
    "ConfigError": "errors",
    "DataConfig": "config",
    "DataError": "errors",
    "ExportConfig": "config",
    "GenerationChunk": "decoding.results",
    "GenerationOptions": "config",
    "GenerationResult": "decoding.results",
    "HandspunError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "Preview": "preflight.preview_data",
    "Scores": "evaluation.score",
    "StoppedError": "errors",
    "TemplateError": "errors",
    "TrainConfig": "config",
    "TrainedRun": "runs.output_dir",
    "TrainingError": "errors",
    "compare": "api",
    "evaluate": "api",
    "export": "api",
    "generate": "api",
    "load": "api",
    "preview": "api",
    "stream": "api",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'handspun' has no attribute {name!r}")
    return getattr(importlib.import_module(f"handspun.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])


__all__ = [
    "ChatModel",
    "Comparison",
    "ConfigError",
    "DataConfig",
    "DataError",
    "ExportConfig",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "HandspunError",
    "ModelError",
    "OutputError",
    "Preview",
    "Scores",
    "StoppedError",
    "TemplateError",
    "TrainConfig",
    "TrainedRun",
    "TrainingError",
    "compare",
    "evaluate",
    "export",
    "generate",
    "load",
    "preview",
    "stream",
    "train",
]
