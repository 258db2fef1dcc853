"""What is compared with transformers: its models and answers, made once, and the findings of a comparison."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from handspun.config import GenerationOptions
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.prompts import context_length, encode_prompts
from handspun.decoding.request import Request
from handspun.decoding.scheduler import feed_prompt
from handspun.decoding.text import vocabulary
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from handspun.models.tokenizer_file import quiet

Status = Literal["pass", "tie", "info", "fail"]
"""A tie: the outputs differ where the numbers behind them are so close that the order of a sum decides. Info:
there is nothing that it could be compared with, or nothing that was promised."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place at which two answers to a prompt part."""

    prompt: int
    """Its number, from 1."""
    token: int
    """Its number in the answer, from 1."""
    ours: str
    theirs: str
    """The two tokens as they read; empty where an answer has ended."""
    margin: float
    """By which the reference prefers its own token, in logits; of beams, in log-probability."""
    rounding: float
    """The largest margin that rounding explains."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin <= self.rounding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the result."""

    check: str
    case: str
    """What was compared."""
    status: Status
    found: str
    """What came of it, in words and numbers."""
    divergences: tuple[Divergence, ...] = ()


def within(check: str, case: str, value: float, limit: float, *, what: str = "difference") -> Finding:
    """A number and what it may be at most. NaN is too much."""
    status: Status = "pass" if value <= limit else "fail"
    return Finding(check=check, case=case, status=status, found=f"{what} {value:.1e}, at most {limit:.1e}")


def compared(check: str, case: str, same: str, divergences: Sequence[Divergence]) -> Finding:
    """Answers: `same` says what is the same if nothing diverges; ties alone are a tie."""
    if not divergences:
        return Finding(check=check, case=case, status="pass", found=same)
    status: Status = "tie" if all(divergence.is_tie for divergence in divergences) else "fail"
    count = len(divergences)
    found = f"{count} answer{'s' if count > 1 else ''} part{'' if count > 1 else 's'} from the reference"
    return Finding(check=check, case=case, status=status, found=found, divergences=tuple(divergences))


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The index of the first token that differs, or at which one of them has ended; None if they are the same."""
    if list(ours) == list(theirs):
        return None
    shorter = min(len(ours), len(theirs))
    return next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)


@dataclass(frozen=True)
class ReferenceAnswer:
    """token_ids: up to and with the eos. logits, processed: (steps, vocab), float32: what each token was chosen
    from, before and behind the processors."""

    token_ids: list[int]
    logits: Tensor
    processed: Tensor


def reference_answer(
    model: PreTrainedModel, prompt: Sequence[int], *, eos_token_ids: Sequence[int], **options: Any
) -> ReferenceAnswer:
    """transformers' answer to one prompt, greedy unless the options, which are transformers', say otherwise.
    Nothing comes from the model's generation_config."""
    output = _generated(model, prompt, eos_token_ids, output_logits=True, **options)
    logits, processed = (torch.cat(steps).float() for steps in (output.logits, output.scores))
    [token_ids] = _cut(output.sequences, prompt, eos_token_ids)
    return ReferenceAnswer(token_ids, logits, processed)


def reference_beams(
    model: PreTrainedModel, prompt: Sequence[int], *, eos_token_ids: Sequence[int], **options: Any
) -> tuple[list[list[int]], list[float]]:
    """The answers of transformers' beam search, the best first, and their scores."""
    output = _generated(model, prompt, eos_token_ids, **options)
    return _cut(output.sequences, prompt, eos_token_ids), output.sequences_scores.tolist()


@torch.no_grad()
def next_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """(vocab,): transformers' log-probabilities of what follows."""
    ids = torch.tensor([token_ids], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits[0, -1].float().log_softmax(-1)


@torch.no_grad()
def _generated(model: PreTrainedModel, prompt: Sequence[int], eos_token_ids: Sequence[int], **options: Any) -> Any:
    ids = torch.tensor([prompt], device=model.device)
    with _without_settings(model), quiet():
        return model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=list(eos_token_ids) or None,
            pad_token_id=eos_token_ids[0] if eos_token_ids else 0,  # only behind an eos, where answers are cut
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, **options},
        )


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills up what it is not given from the model's generation_config."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _cut(sequences: Tensor, prompt: Sequence[int], eos_token_ids: Sequence[int]) -> list[list[int]]:
    answers = sequences[:, len(prompt) :].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in eos_token_ids), len(ids)) for ids in answers]
    return [ids[:end] for ids, end in zip(answers, ends, strict=True)]


TOLERANCE = 1e-4
"""Of logits in float32, by the largest of them (or by 1): what sums in another order may differ by."""
_MOST_PROMPTS = 32
"""Each is decoded some thirty times, and the logits of every step are kept."""


@dataclass(frozen=True)
class Reference:
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

    def job(
        self, prompts: Iterable[int] | None = None, *, chat: ChatModel | None = None, **options: Any
    ) -> Request:
        """What `generate` would make of some of the prompts (their indices; all if not given) under exactly these
        options, in one batch.

        chat: decoded in place of the model in float32.
        """
        chosen = range(len(self.prompts)) if prompts is None else list(prompts)
        of_job = {name: options.pop(name) for name in ("logprobs", "explain", "show_tree") if name in options}
        model = chat or self.chat
        return Request(
            model=model,
            options=SamplingParams(eos_token_ids=self.eos_token_ids, **options),
            vocabulary=vocabulary(model.tokenizer),
            prompts=[self.prompts[i] for i in chosen],
            limits=[self.limits[i] for i in chosen],
            with_tools=False,
            batch_size=1_000_000,
            max_batch_tokens=1_000_000,
            should_stop=lambda: False,
            **{"logprobs": False, **of_job},
        )


def build_reference(chat: ChatModel, texts: Sequence[str], *, is_chat: bool, max_new_tokens: int) -> Reference:
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
    return Reference(chat, is_chat, list(texts), prompts, limits, eos, answers, logits)


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
                feeds[i] = ModelInput(feeds[i].row, [answers[i][len(found[i]) - 1]])
        running = [i for i in running if len(found[i]) < len(answers[i])]
    return [torch.stack(rows) for rows in found]
