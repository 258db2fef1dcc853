"""The same prompts to several models, one after the other, so that memory holds one of them."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from handspun.config import GenerationOptions
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.kernels.allocator import malloc_trim
from handspun.models.load import ChatModel


@dataclass(frozen=True)
class Comparison:
    """What each model answers: answers[model][prompt] are its num_return_sequences results."""

    models: list[str]
    prompts: list[str]
    answers: list[list[list[GenerationResult]]]


def compare(
    models: Sequence[str],
    prompts: Sequence[str],
    *,
    load: Callable[[str], ChatModel],
    options: GenerationOptions,
    chat: bool = True,
    system_prompt: str | None = None,
    batch_size: int = 8,
    notice: Callable[[str], None],
) -> Comparison:
    """Every model's answers to every prompt. A model is let go before the next one is loaded."""
    answers = []
    for name in models:
        results = generate(
            load(name),
            list(prompts),
            options=options,
            chat=chat,
            system_prompt=system_prompt,
            batch_size=batch_size,
            notice=lambda text, name=name: notice(f"{name}: {text}"),  # type: ignore[misc]
        )
        answers.append([[r for r in results if r.prompt_index == place] for place in range(len(prompts))])
        _free()
    return Comparison(list(models), list(prompts), answers)


def _free() -> None:
    gc.collect()
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
