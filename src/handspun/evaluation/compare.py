"""Ask several models the same prompts, one model at a time, so that only one is in memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from handspun.config import GenerationOptions
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.display import prefixed_log
from handspun.kernels.allocator import malloc_trim
from handspun.models.load import ChatModel


@dataclass(frozen=True)
class Comparison:
    """The answers of each model: answers[model][prompt] is a list of num_return_sequences results."""

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
) -> Comparison:
    """Return every model's answers to every prompt. A model is freed before the next one is loaded.

    Args:
        models: Names of the models.
        prompts: User messages, or plain texts with chat=False.
        load: Loads a model by name.
        options: Generation options, the same for all models.
        chat: Put the prompts into each model's chat template.
        system_prompt: System message of every prompt.
        batch_size: Number of answers decoded together.
    """
    answers = []
    for name in models:
        model = load(name)
        with prefixed_log(f"{name}: "):
            results = generate(
                model,
                list(prompts),
                options=options,
                chat=chat,
                system_prompt=system_prompt,
                batch_size=batch_size,
            )
        del model
        answers.append([[r for r in results if r.prompt_index == place] for place in range(len(prompts))])
        _free()
    return Comparison(list(models), list(prompts), answers)


def _free() -> None:
    gc.collect()
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
