"""The reference: transformers' answers to the prompts, computed once, and the findings of a comparison."""

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
from handspun.decoding.generate import answer_all
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.processors import make_processors
from handspun.decoding.prompts import context_length, encode_prompts
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationResult
from handspun.decoding.scheduler import BatchLimits
from handspun.decoding.text import vocabulary
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from handspun.models.tokenizer_file import quiet

Status = Literal["pass", "tie", "info", "fail"]
"""Tie: outputs differ, but the numbers behind them are so close that the order of a sum decides. Info: there is no
counterpart to compare with, or no equality is promised."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token at which two answers to a prompt differ."""

    prompt: int
    """Number of the prompt, from 1."""
    token: int
    """Number of the token in the answer, from 1."""
    ours: str
    theirs: str
    """Texts of the two tokens; empty if an answer has ended."""
    margin: float
    """How much the reference prefers its own token: in logits, or in log-probability for beams."""
    rounding: float
    """The largest margin that rounding explains."""

    @property
    def is_tie(self) -> bool:
        """True if rounding explains the difference."""
        return self.margin <= self.rounding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the result."""

    check: str
    case: str
    """What was compared."""
    status: Status
    found: str
    """The result in words and numbers."""
    divergences: tuple[Divergence, ...] = ()


def within(check: str, case: str, value: float, limit: float, *, what: str = "difference") -> Finding:
    """Return a finding that passes if value <= limit. NaN fails.

    Args:
        check: Name of the check.
        case: What was compared.
        value: The measured value.
        limit: Its maximum.
        what: Name of the value in the text.
    """
    status: Status = "pass" if value <= limit else "fail"
    return Finding(check=check, case=case, status=status, found=f"{what} {value:.1e}, at most {limit:.1e}")


def compared(check: str, case: str, same: str, divergences: Sequence[Divergence]) -> Finding:
    """Return a finding about answers: passed without divergences, a tie if all of them are ties, otherwise failed.

    Args:
        check: Name of the check.
        case: What was compared.
        same: Text for a pass.
        divergences: The differences found.
    """
    if not divergences:
        return Finding(check=check, case=case, status="pass", found=same)
    status: Status = "tie" if all(divergence.is_tie for divergence in divergences) else "fail"
    count = len(divergences)
    found = f"{count} answer{'s' if count > 1 else ''} differ{'' if count > 1 else 's'} from the reference"
    return Finding(check=check, case=case, status=status, found=found, divergences=tuple(divergences))


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the index of the first token that differs or is missing on one side; None if there is none."""
    if list(ours) == list(theirs):
        return None
    shorter = min(len(ours), len(theirs))
    return next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)


@dataclass(frozen=True)
class ReferenceAnswer:
    """An answer of transformers.

    token_ids: the answer, eos included. logits, processed: (steps, vocab), float32, before and after the
    processors.
    """

    token_ids: list[int]
    logits: Tensor
    processed: Tensor


def reference_answer(
    model: PreTrainedModel, prompt: Sequence[int], *, eos_token_ids: Sequence[int], **options: Any
) -> ReferenceAnswer:
    """Return transformers' answer to one prompt, greedy by default. options: those of transformers' `generate`.

    The model's generation_config is not used.
    """
    output = _generated(model, prompt, eos_token_ids, output_logits=True, **options)
    logits, processed = (torch.cat(steps).float() for steps in (output.logits, output.scores))
    [token_ids] = _cut(output.sequences, prompt, eos_token_ids)
    return ReferenceAnswer(token_ids, logits, processed)


def reference_beams(
    model: PreTrainedModel, prompt: Sequence[int], *, eos_token_ids: Sequence[int], **options: Any
) -> tuple[list[list[int]], list[float]]:
    """Return the answers of transformers' beam search, best first, and their scores."""
    output = _generated(model, prompt, eos_token_ids, **options)
    return _cut(output.sequences, prompt, eos_token_ids), output.sequences_scores.tolist()


@torch.no_grad()
def next_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Return transformers' log-probabilities of the next token: (vocab,)."""
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
            pad_token_id=eos_token_ids[0] if eos_token_ids else 0,  # only after an eos, where answers are cut
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, **options},
        )


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's generation_config inside the block."""
    own = model.generation_config  # `generate` would take missing options from it
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
"""How much float32 logits may differ when sums run in another order, relative to the largest (at least 1)."""
_MOST_PROMPTS = 32
"""Maximum number of prompts: each is decoded about thirty times, and the logits of every step are kept."""


@dataclass(frozen=True)
class Reference:
    """A model in float32 with prompts and transformers' answers.

    prompts: token ids. limits: maximum number of new tokens per prompt. answers: transformers' greedy answers.
    logits: the engine's logits along these answers, (steps, vocab) per prompt.
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
        """Maximum allowed difference of two logits."""
        return TOLERANCE * max(1.0, *(float(answer.logits.abs().max()) for answer in self.answers))

    @property
    def largest_difference(self) -> float:
        """Largest difference of the engine's logits from transformers'."""
        pairs = zip(self.logits, self.answers, strict=True)
        return float(torch.stack([(ours - answer.logits).abs().max() for ours, answer in pairs]).max())

    @property
    def rounding(self) -> float:
        """The largest margin between two tokens that rounding explains."""
        # Sums in another order move both tokens' logits by the difference found on this model: twice that for the
        # two logits, and twice again for steps that were not compared. A larger margin is a bug, not a tie.
        return min(self.tolerance, max(4 * self.largest_difference, 0.01 * self.tolerance))

    def text_of(self, token_ids: Sequence[int], place: int) -> str:
        """Return the text of one token; empty after the last."""
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
        """Return the divergence of two answers to a prompt.

        Args:
            prompt: Index of the prompt.
            place: Index of the first different token.
            ours: Our token ids.
            theirs: The reference's token ids.
            margin: How much the reference prefers its own token.
            rounding: The largest margin that rounding explains.
        """
        return Divergence(
            prompt=prompt + 1,
            token=place + 1,
            ours=self.text_of(ours, place),
            theirs=self.text_of(theirs, place),
            margin=margin,
            rounding=rounding,
        )

    def decode(
        self, prompts: Iterable[int] | None = None, *, chat: ChatModel | None = None, **options: Any
    ) -> list[GenerationResult]:
        """Answer some prompts under exactly these options, in one batch.

        prompts: indices of the prompts; all if not given. chat: model to use instead of the float32 model.
        """
        flags = {name: options.pop(name) for name in ("logprobs", "explain", "show_tree") if name in options}
        model = chat or self.chat
        params = SamplingParams(eos_token_ids=self.eos_token_ids, **options)
        words, processors = vocabulary(model.tokenizer), make_processors(params)
        requests = [
            Request(
                prompt_token_ids=self.prompts[index],
                options=params,
                vocabulary=words,
                max_new_tokens=self.limits[index],
                processors=processors,
                prompt_index=number,
                **flags,
            )
            for number, index in enumerate(range(len(self.prompts)) if prompts is None else prompts)
        ]
        return answer_all(model, requests, BatchLimits(rows=1_000_000, tokens=1_000_000))


def build_reference(chat: ChatModel, texts: Sequence[str], *, is_chat: bool, max_new_tokens: int) -> Reference:
    """Return the reference: transformers' answers to the prompts, and the engine's logits along them.

    Args:
        chat: The model in float32.
        texts: User messages, or plain texts with is_chat=False.
        is_chat: Put the prompts into the chat template.
        max_new_tokens: Maximum number of tokens per answer.

    Raises DataError, TemplateError or ConfigError for prompts and options that cannot be decoded.
    """
    if len(texts) > _MOST_PROMPTS:
        raise ConfigError(
            f"there are {len(texts)} prompts, and each is decoded about thirty times. "
            f"Give at most {_MOST_PROMPTS}, of the different kinds that matter to you."
        )
    prompts = encode_prompts(chat, list(texts), chat=is_chat, system_prompt=None, tools=None)
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    eos = resolve(options, chat, chat=is_chat)[0].eos_token_ids
    context = context_length(chat)
    limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    # transformers first: making an engine moves the model's weights into the fused layout.
    answers = [
        reference_answer(chat.model, ids, eos_token_ids=eos, max_new_tokens=limit)
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    logits = engine_logits(chat, prompts, [answer.token_ids for answer in answers])
    return Reference(chat, is_chat, list(texts), prompts, limits, eos, answers, logits)


def engine_logits(chat: ChatModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Tensor]:
    """Return the engine's logits for each token of the answers, (steps, vocab) per prompt.

    All prompts are prefilled together, then each step feeds one token per answer. Finished answers leave.
    """
    engine = make_engine(chat)
    feeds = []
    for prompt in prompts:
        feeds.append(ModelInput(engine.add(), prompt))
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
