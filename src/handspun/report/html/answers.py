"""Answers to a few prompts under greedy decoding, sampling and beam search, before training and after it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from handspun.config import TrainConfig
from handspun.decoding.generate import generate
from handspun.models.lean import own_weights
from handspun.models.load import ChatModel

GREEDY_PROMPT = "Give me a brief introduction to Shanghai Jiao Tong University."
SAMPLING_PROMPT = "Tell me a joke about computers."
BEAM_PROMPT = "What is the sum of the first 100 natural numbers? Please think step by step."
DEMONSTRATION_PROMPTS = (GREEDY_PROMPT, SAMPLING_PROMPT, BEAM_PROMPT)

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "seed": 0},
    "beam search": {"num_beams": 4},
}
"""What a reader sees of each prompt, with the options of `generate`."""

MAX_NEW_TOKENS = 64
SECONDS = 60.0
"""For all answers before training, and for all after it."""


@dataclass(frozen=True)
class SampleAnswer:
    """One answer; finish_reason is `generate`'s, "cancelled" where the time was up."""

    prompt: str
    decoding: str
    text: str
    finish_reason: str


@dataclass(frozen=True)
class SampleAnswers:
    """Prompt by prompt within each decoding, and what was taken over from the model's generation_config."""

    answers: list[SampleAnswer]
    notes: list[str] = field(default_factory=list)


def prompts_of(config: TrainConfig) -> tuple[str, ...]:
    """The prompts that a run answers."""
    return DEMONSTRATION_PROMPTS if config.sample_prompts is None else tuple(config.sample_prompts)


def sample_answers(
    model: ChatModel,
    prompts: Sequence[str],
    *,
    system_prompt: str | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> SampleAnswers:
    """Answers of at most 64 tokens. Each decoding has an equal share of the time that is left to it.

    The model's weights are afterwards as they were, in memory of their own. Raises what `generate` raises.
    """
    answers: list[SampleAnswer] = []
    notes: dict[str, None] = {}
    end = clock() + seconds
    for place, (name, options) in enumerate(DECODINGS.items()):
        until = clock() + (end - clock()) / (len(DECODINGS) - place)
        results = generate(
            model,
            list(prompts),
            system_prompt=system_prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            notice=lambda text: notes.update({text: None}),
            should_stop=lambda until=until: clock() > until,  # type: ignore[misc]
            **options,
        )
        answers += [
            SampleAnswer(prompts[result.prompt_index], name, result.text, result.finish_reason)
            for result in results
        ]
    own_weights(model.model)
    return SampleAnswers(answers, list(notes))
