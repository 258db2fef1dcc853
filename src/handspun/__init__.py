"""Fine-tune small chat models, and decode from them, with a loop and a decoding written by hand.

    import handspun

    model = handspun.load("Qwen/Qwen2.5-0.5B")
    run = handspun.train(handspun.TrainConfig(model="...", data="train.csv", output_dir="output"))
    answers = handspun.generate(model, ["Tell me a joke."] * 3, do_sample=True, temperature=0.7)

The names are imported when they are first used: `import handspun` brings in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handspun.config import GenerationOptions, TrainConfig
    from handspun.decoding.generate import generate, stream
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
    from handspun.models.load import ChatModel, load
    from handspun.runs.output_dir import TrainedRun
    from handspun.runs.train import train

__version__ = "0.1.0"

_HOMES = {
    "ChatModel": "models.load",
    "ConfigError": "errors",
    "DataError": "errors",
    "GenerationChunk": "decoding.results",
    "GenerationOptions": "config",
    "GenerationResult": "decoding.results",
    "HandspunError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "StoppedError": "errors",
    "TemplateError": "errors",
    "TrainConfig": "config",
    "TrainedRun": "runs.output_dir",
    "TrainingError": "errors",
    "generate": "decoding.generate",
    "load": "models.load",
    "stream": "decoding.generate",
    "train": "runs.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'handspun' has no attribute {name!r}")
    return getattr(importlib.import_module(f"handspun.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])


__all__ = [
    "ChatModel",
    "ConfigError",
    "DataError",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "HandspunError",
    "ModelError",
    "OutputError",
    "StoppedError",
    "TemplateError",
    "TrainConfig",
    "TrainedRun",
    "TrainingError",
    "generate",
    "load",
    "stream",
    "train",
]
