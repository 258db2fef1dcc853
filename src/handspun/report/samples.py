"""Answers while a model is being trained, so that one sees them change."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from handspun.config import TrainConfig
from handspun.decoding.generate import generate
from handspun.decoding.prompts import encode_prompts
from handspun.models.load import ChatModel
from handspun.report.html.answers import DECODINGS, MAX_NEW_TOKENS, SampleAnswer, prompts_of
from handspun.training.loop import Event, Loop
from handspun.training.packed_attention import attention_of

_SECONDS = 30.0
"""For all answers behind one step."""


@dataclass(frozen=True)
class Samples:
    """Greedy answers by the weights behind a step, prompt by prompt."""

    step: int
    epoch: int
    answers: list[SampleAnswer]
    seconds: float


@dataclass(frozen=True)
class Sampler:
    """Answers prompts in the middle of a run, and leaves the model to it as it was: weights, mode and attention.

    attention: the model's own, which it does not have inside of a packed execution.
    """

    chat: ChatModel
    prompts: tuple[str, ...]
    system_prompt: str | None
    every: int
    attention: str
    clock: Callable[[], float] = time.perf_counter

    def is_due(self, event: Event, loop: Loop) -> bool:
        """Whether the event is the last one of a step that answers are wanted after."""
        return loop.ends_step(event) and event.step > 0 and event.step % self.every == 0

    def after(self, event: Event) -> Samples:
        """Answers of at most 64 tokens; "cancelled" where half a minute is over."""
        model, began = self.chat.model, self.clock()
        was_training = model.training
        model.eval()
        with attention_of(model, self.attention):
            results = generate(
                self.chat,
                list(self.prompts),
                system_prompt=self.system_prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                notice=lambda _: None,
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
    """The sampler that the config asks for, made before the execution, which changes the model's attention.

    Raises DataError or TemplateError for a prompt that cannot be answered.
    """
    prompts = prompts_of(config)
    if config.sample_every is None or not prompts:
        return None
    encode_prompts(chat, list(prompts), chat=True, system_prompt=config.system_prompt, tools=None)
    chat = replace(chat, in_training=True)
    return Sampler(
        chat, prompts, config.system_prompt, config.sample_every, chat.model.config._attn_implementation
    )
