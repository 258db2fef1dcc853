"""Answers to a few prompts before, during, and after training."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from handspun.config import TrainConfig
from handspun.decoding.generate import generate
from handspun.decoding.prompts import encode_prompts
from handspun.display import captured_log
from handspun.models.fused import unfuse_weights
from handspun.models.load import ChatModel
from handspun.training.loop import Event, Loop
from handspun.training.packed import attention_of

GREEDY_PROMPT = "Give me a brief introduction to Shanghai Jiao Tong University."
SAMPLING_PROMPT = "Tell me a joke about computers."
BEAM_PROMPT = "What is the sum of the first 100 natural numbers? Please think step by step."
DEMONSTRATION_PROMPTS = (GREEDY_PROMPT, SAMPLING_PROMPT, BEAM_PROMPT)

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "seed": 0},
    "beam search": {"num_beams": 4},
}
"""The decodings of each prompt, with the options of `generate`."""

MAX_NEW_TOKENS = 64
SECONDS = 60.0
"""Time limit for all answers before training, and again after it."""


@dataclass(frozen=True)
class SampleAnswer:
    """One answer. finish_reason is `generate`'s; "cancelled" if the time was up."""

    prompt: str
    decoding: str
    text: str
    finish_reason: str


@dataclass(frozen=True)
class SampleAnswers:
    """Answers, prompt by prompt within each decoding, and notes on defaults taken from generation_config."""

    answers: list[SampleAnswer]
    notes: list[str] = field(default_factory=list)


def prompts_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the prompts that a run answers."""
    return DEMONSTRATION_PROMPTS if config.sample_prompts is None else tuple(config.sample_prompts)


def sample_answers(
    model: ChatModel,
    prompts: Sequence[str],
    *,
    system_prompt: str | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> SampleAnswers:
    """Return answers of at most 64 tokens. Each decoding gets an equal share of the time left.

    Afterwards the model's weights are as before, in their own memory. Raises what `generate` raises.
    """
    answers: list[SampleAnswer] = []
    notes: dict[str, None] = {}
    end = clock() + seconds
    for place, (name, options) in enumerate(DECODINGS.items()):
        until = clock() + (end - clock()) / (len(DECODINGS) - place)
        with captured_log() as lines:
            results = generate(
                model,
                list(prompts),
                system_prompt=system_prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                should_stop=lambda until=until: clock() > until,  # type: ignore[misc]
                **options,
            )
        notes |= dict.fromkeys(lines)
        answers += [
            SampleAnswer(prompts[result.prompt_index], name, result.text, result.finish_reason)
            for result in results
        ]
    unfuse_weights(model.model)
    return SampleAnswers(answers, list(notes))


_SECONDS = 30.0
"""Time limit for all answers after one step."""


@dataclass(frozen=True)
class Samples:
    """Greedy answers by the weights after a step, prompt by prompt."""

    step: int
    epoch: int
    answers: list[SampleAnswer]
    seconds: float


@dataclass(frozen=True)
class Sampler:
    """Answers prompts during a run, and leaves the model as it was: weights, mode, and attention.

    attention: the model's own, which a packed runner replaces.
    """

    chat: ChatModel
    prompts: tuple[str, ...]
    system_prompt: str | None
    every: int
    attention: str
    clock: Callable[[], float] = time.perf_counter

    def is_due(self, event: Event, loop: Loop) -> bool:
        """Return whether the event is the last one of a step after which answers are wanted."""
        return loop.ends_step(event) and event.step > 0 and event.step % self.every == 0

    def after(self, event: Event) -> Samples:
        """Return answers of at most 64 tokens; "cancelled" after half a minute."""
        model, began = self.chat.model, self.clock()
        was_training = model.training
        model.eval()
        with captured_log(), attention_of(model, self.attention):
            results = generate(
                self.chat,
                list(self.prompts),
                system_prompt=self.system_prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                should_stop=lambda: self.clock() - began > _SECONDS,
                **DECODINGS["greedy"],
            )
        model.train(was_training)
        answers = [
            SampleAnswer(self.prompts[result.prompt_index], "greedy", result.text, result.finish_reason)
            for result in results
        ]
        return Samples(event.step, event.epoch, answers, self.clock() - began)


def sampler_of(chat: ChatModel, config: TrainConfig) -> Sampler | None:
    """Return the sampler that the config asks for.

    It is made before the runner, which changes the model's attention. Raises DataError or TemplateError for a
    prompt that cannot be answered.
    """
    prompts = prompts_of(config)
    if config.sample_every is None or not prompts:
        return None
    encode_prompts(chat, list(prompts), chat=True, system_prompt=config.system_prompt, tools=None)
    chat = replace(chat, in_training=True)
    return Sampler(
        chat, prompts, config.system_prompt, config.sample_every, chat.model.config._attn_implementation
    )
