"""Ask several models the same prompts, one model at a time, so that only one is in memory."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from handspun.config import GenerationOptions
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.display import count_of, prefixed_log
from handspun.kernels.allocator import malloc_trim
from handspun.models.load import ChatModel


@dataclass(frozen=True)
class Comparison:
    """The answers of each model: answers[model][prompt] is a list of num_return_sequences results.

    seconds: how long each model took for its answers, without loading.
    """

    models: list[str]
    prompts: list[str]
    answers: list[list[list[GenerationResult]]]
    seconds: list[float] = field(default_factory=list)


def speed(comparison: Comparison, place: int) -> str:
    """Return how many tokens a model generated and how fast; "" if its time is unknown."""
    if len(comparison.seconds) <= place:
        return ""
    tokens = sum(len(result.token_ids) for results in comparison.answers[place] for result in results)
    seconds = comparison.seconds[place]
    return f"{count_of(tokens, 'token')} in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s"


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
    answers, seconds = [], []
    for name in models:
        model = load(name)
        began = time.perf_counter()
        with prefixed_log(f"{name}: "):
            results = generate(
                model,
                list(prompts),
                options=options,
                chat=chat,
                system_prompt=system_prompt,
                batch_size=batch_size,
            )
        seconds.append(time.perf_counter() - began)
        del model
        answers.append([[r for r in results if r.prompt_index == place] for place in range(len(prompts))])
        _free()
    return Comparison(list(models), list(prompts), answers, seconds)


def _free() -> None:
    gc.collect()
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
