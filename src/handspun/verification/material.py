"""What the checks work on: prompts, transformers' greedy answers to them, and the engine's logits along these."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handspun.config import GenerationOptions
from handspun.decoding.answer import Job
from handspun.decoding.decode import feed_prompt
from handspun.decoding.detokenize import vocabulary
from handspun.decoding.engine import Feed
from handspun.decoding.engines import make_engine
from handspun.decoding.options import ResolvedOptions, resolve
from handspun.decoding.prompts import context_length, encode_prompts
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from handspun.verification.findings import Divergence
from handspun.verification.reference import ReferenceAnswer, reference_answer

TOLERANCE = 1e-4
"""Of logits in float32, by the largest of them (or by 1): what sums in another order may differ by."""
_MOST_PROMPTS = 32
"""Each is decoded some thirty times, and the logits of every step are kept."""


@dataclass(frozen=True)
class Material:
    """A model in float32 with its prompts.

    prompts: token ids. limits: most new tokens of each. answers: transformers', greedy. logits: the engine's, for
    each prompt (steps, vocab), from which the tokens of transformers' answer would have been chosen.
    """

    chat: ChatModel
    is_chat: bool
    texts: list[str]
    prompts: list[list[int]]
    limits: list[int]
    eos_token_ids: tuple[int, ...]
    answers: list[ReferenceAnswer]
    logits: list[Tensor]

    @property
    def tolerance(self) -> float:
        """Most that two logits may differ by."""
        return TOLERANCE * max(1.0, *(float(answer.logits.abs().max()) for answer in self.answers))

    @property
    def largest_difference(self) -> float:
        """Of the engine's logits from transformers'."""
        pairs = zip(self.logits, self.answers, strict=True)
        return float(torch.stack([(ours - answer.logits).abs().max() for ours, answer in pairs]).max())

    @property
    def rounding(self) -> float:
        """The largest margin between two tokens that rounding explains: each logit may move by what was found,
        doubled for places that were not looked at, and by no more than is tolerated."""
        return min(self.tolerance, max(4 * self.largest_difference, 0.01 * self.tolerance))

    def text_of(self, token_ids: Sequence[int], place: int) -> str:
        """One token as it reads; nothing behind the last."""
        return vocabulary(self.chat.tokenizer).text_of(token_ids[place]) if place < len(token_ids) else ""

    def divergence(
        self,
        prompt: int,
        place: int,
        ours: Sequence[int],
        theirs: Sequence[int],
        *,
        margin: float,
        rounding: float,
    ) -> Divergence:
        """Of two answers to a prompt (its index), at a token (its index)."""
        return Divergence(
            prompt=prompt + 1,
            token=place + 1,
            ours=self.text_of(ours, place),
            theirs=self.text_of(theirs, place),
            margin=margin,
            rounding=rounding,
        )

    def job(self, prompts: Iterable[int] | None = None, *, chat: ChatModel | None = None, **options: Any) -> Job:
        """What `generate` would make of some of the prompts (their indices; all if not given) under exactly these
        options, in one batch.

        chat: decoded in place of the model in float32.
        """
        chosen = range(len(self.prompts)) if prompts is None else list(prompts)
        of_job = {name: options.pop(name) for name in ("logprobs", "explain", "show_tree") if name in options}
        model = chat or self.chat
        return Job(
            model=model,
            options=ResolvedOptions(eos_token_ids=self.eos_token_ids, **options),
            vocabulary=vocabulary(model.tokenizer),
            prompts=[self.prompts[i] for i in chosen],
            limits=[self.limits[i] for i in chosen],
            with_tools=False,
            batch_size=1_000_000,
            max_batch_tokens=1_000_000,
            should_stop=lambda: False,
            **{"logprobs": False, **of_job},
        )


def gather(chat: ChatModel, texts: Sequence[str], *, is_chat: bool, max_new_tokens: int) -> Material:
    """Asks transformers first: making an engine lays the model's weights out anew.

    Raises DataError, TemplateError, ConfigError for prompts and options that cannot be decoded.
    """
    if len(texts) > _MOST_PROMPTS:
        raise ConfigError(
            f"there are {len(texts)} prompts, and each is decoded some thirty times. "
            f"Give at most {_MOST_PROMPTS}, of the different kinds that matter to you."
        )
    prompts = encode_prompts(chat, list(texts), chat=is_chat, system_prompt=None, tools=None)
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    eos = resolve(options, chat, chat=is_chat)[0].eos_token_ids
    context = context_length(chat)
    limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    answers = [
        reference_answer(chat.model, ids, eos_token_ids=eos, max_new_tokens=limit)
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    logits = engine_logits(chat, prompts, [answer.token_ids for answer in answers])
    return Material(chat, is_chat, list(texts), prompts, limits, eos, answers, logits)


def engine_logits(chat: ChatModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Tensor]:
    """The engine's logits for each token of the answers, (steps, vocab): all prompts, then a token of each at a
    time; an answer that is over leaves."""
    engine = make_engine(chat)
    feeds = [feed_prompt(engine, prompt) for prompt in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    while running:
        logits = engine.forward([feeds[i] for i in running])
        for i, row in zip(running, logits, strict=True):
            found[i].append(row)
            if len(found[i]) == len(answers[i]):
                engine.free(feeds[i].row)
            else:
                feeds[i] = Feed(feeds[i].row, [answers[i][len(found[i]) - 1]])
        running = [i for i in running if len(found[i]) < len(answers[i])]
    return [torch.stack(rows) for rows in found]


__all__ = ["TOLERANCE", "Material", "engine_logits", "gather"]
