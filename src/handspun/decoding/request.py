"""`Request`: one prompt and what is asked about it. `Completion`: one answer while it is being written."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from handspun.decoding.explain import Explanation
from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import Processor
from handspun.decoding.results import FinishReason, GenerationChunk, GenerationResult, TopLogprobs
from handspun.decoding.text import StreamingText, Vocabulary
from handspun.decoding.tool_calls import parse_tool_calls
from handspun.errors import ModelError
from handspun.models.load import ChatModel, nonfinite_weights


class Score(NamedTuple):
    """A token's log-probability in the model's own distribution, and the most probable tokens in its place."""

    logprob: float
    top: TopLogprobs
    rank: int | None = None
    """Rank in that distribution, 1 for the most probable token. Only of a prompt's tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One prompt, with the options of its answers. Requests are compared by identity."""

    prompt_token_ids: list[int]
    options: SamplingParams
    vocabulary: Vocabulary
    max_new_tokens: int
    """Maximum number of tokens per answer: the option's value, or less if the context is too short for it."""
    prompt_index: int = 0
    """Index of the prompt among those of one call. It is part of the answers' random streams."""
    processors: tuple[Processor, ...] = ()
    """The logits processors that the options ask for. Rows that share this tuple are processed in one call."""
    penalized_token_ids: list[int] | None = None
    """Tokens of the prompt that the repetition penalty counts. None counts all."""
    answer_token_ids: list[int] = field(default_factory=list)
    """The first tokens of the answers, already chosen: decoding goes on behind them. They count for the answer's
    limit, the penalties and the random streams. Chunks, log-probabilities and explanations begin behind them."""
    logprobs: bool = False
    top_logprobs: int = 0
    """With logprobs: also the most probable tokens of each step, this many."""
    prompt_logprobs: bool = False
    """Also score the prompt's own tokens. max_new_tokens may be 0 then."""
    scored_from: int = 1
    """With prompt_logprobs: index of the first token that is scored. Those before it may be known already."""
    explain: bool = False
    show_tree: bool = False
    with_tools: bool = False
    """Parse tool calls from the answers."""
    cache_namespace: Hashable = None
    """Whose prompts' beginnings may be used again, if the scheduler keeps any. None: nobody's."""
    on_prompt: Callable[[int, int], None] | None = None
    """Called with (tokens prefilled, prompt tokens) as a long prompt progresses."""
    on_start: Callable[[int], None] | None = None
    """Called when the prompt begins to be read, with the number of its tokens that were known."""
    on_error: Callable[[BaseException], None] | None = None
    """Called if answering fails, which then ends this request alone. Without it, the error ends all."""

    @property
    def read_token_ids(self) -> list[int]:
        """The tokens that are read before the first new one is chosen."""
        return self.prompt_token_ids + self.answer_token_ids


@dataclass(eq=False)
class Completion:
    """The tokens and the text of one answer so far."""

    request: Request
    return_index: int
    text: StreamingText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)
    """Of the prompt's tokens from the second on, if requested."""
    cached_tokens: int = 0
    explanation: list[Explanation] = field(default_factory=list)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: FinishReason | None = None
    rows: ClassVar[int] = 1
    """Number of rows that it takes in a batch."""

    @classmethod
    def start(cls, request: Request, return_index: int = 0) -> "Completion":
        """Return an answer without new tokens."""
        text = StreamingText.start(request.vocabulary, request.options.stop_strings)
        for token_id in request.answer_token_ids:
            text.push(token_id)
        return cls(request, return_index, text, list(request.answer_token_ids))

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.request.prompt_token_ids

    @property
    def max_total_tokens(self) -> int:
        """Number of prompt and answer tokens when the answer reaches its limit."""
        return len(self.request.prompt_token_ids) + self.request.max_new_tokens

    @property
    def reserved_tokens(self) -> int:
        """Most slots that its row takes, rejected draft tokens included."""
        return self.max_total_tokens + self.request.options.prompt_lookup_num_tokens

    @property
    def prompt_ids_for_penalty(self) -> list[int]:
        """Prompt tokens that the repetition penalty counts."""
        counted = self.request.penalized_token_ids
        return self.request.prompt_token_ids if counted is None else counted

    def copy(self) -> "Completion":
        """Return an independent copy, so that a beam can branch."""
        return replace(
            self,
            text=self.text.copy(),
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            top_logprobs=list(self.top_logprobs),
        )

    def add(self, token_id: int, score: Score | None = None) -> GenerationChunk:
        """Add a token. End the answer at an eos, a stop string or its limit, checked in that order."""
        chunk = self._add(token_id, score)
        if score is None:
            return chunk
        return replace(
            chunk, logprobs=[score.logprob], top_logprobs=[score.top] if self.request.top_logprobs else []
        )

    def _add(self, token_id: int, score: Score | None) -> GenerationChunk:
        self.token_ids.append(token_id)
        if score is not None:
            self.logprobs.append(score.logprob)
            self.top_logprobs.append(score.top)
        if token_id in self.request.options.eos_token_ids:
            return self.finish("eos", token_id)
        shown = self.text.push(token_id)
        if self.text.stop_string is not None or len(self.token_ids) >= self.request.max_new_tokens:
            return self.finish("length", token_id, shown)
        return GenerationChunk(
            prompt_index=self.request.prompt_index,
            return_index=self.return_index,
            text=shown,
            token_ids=[token_id],
        )

    def finish(self, reason: FinishReason, token_id: int | None = None, shown: str = "") -> GenerationChunk:
        """End the answer. Emit its buffered text, unless that completes a stop string."""
        shown += self.text.finish()
        self.finish_reason = "stop" if self.text.stop_string is not None else reason
        return GenerationChunk(
            prompt_index=self.request.prompt_index,
            return_index=self.return_index,
            text=shown,
            token_ids=[] if token_id is None else [token_id],
            finish_reason=self.finish_reason,
            result=self.result(),
        )

    def cancel(self) -> list[GenerationChunk]:
        """End the answer with what it has."""
        return [self.finish("cancelled")]

    def result(self) -> GenerationResult:
        """Return the finished answer as the user gets it."""
        assert self.finish_reason is not None
        request, scores = self.request, self.prompt_scores
        has_top, before = bool(request.top_logprobs), [None] * request.scored_from
        return GenerationResult(
            text=self.text.text,
            token_ids=self.token_ids,
            prompt_token_ids=self.prompt_token_ids,
            finish_reason=self.finish_reason,
            stop_string=self.text.stop_string,
            logprobs=self.logprobs if request.logprobs else None,
            top_logprobs=self.top_logprobs if request.logprobs and has_top else None,
            prompt_logprobs=[*before, *(one.logprob for one in scores)] if request.prompt_logprobs else None,
            prompt_ranks=[*before, *(one.rank for one in scores)] if request.prompt_logprobs else None,
            prompt_top_logprobs=[*([] for _ in before), *(one.top for one in scores)]
            if request.prompt_logprobs and has_top
            else None,
            cached_tokens=self.cached_tokens,
            explanation=self.explanation if request.explain else None,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            prompt_index=request.prompt_index,
            return_index=self.return_index,
            tool_calls=parse_tool_calls(self.text.text)[1] if request.with_tools else [],
        )


_CHECKED: WeakSet[nn.Module] = WeakSet()
"""Models whose weights have been checked, once per model: the check takes as long as a decoding step."""


def check_finite(logits: Tensor, answers: Sequence[Completion], model: ChatModel) -> None:
    """Raise ModelError if any of the model's logits is NaN or infinite. logits: (answers, vocab).

    NaN in some weights can leave the logits finite, since attention counts a NaN in its softmax as 0. So the
    weights are checked too, at the first step of a model's first answers.
    """
    if not bool(torch.isfinite(logits.sum())):  # one pass over the logits in the usual case
        wrong = (~torch.isfinite(logits)).sum(-1).tolist()
        if any(wrong):  # otherwise large finite logits only made the sum overflow
            row = next(i for i, count in enumerate(wrong) if count)
            what = f"{wrong[row]:,} of the model's {logits.shape[-1]:,} logits are NaN or infinite"
            raise ModelError(
                f"{model.name}: {what}, {_where(answers[row])}. {_remedy(nonfinite_weights(model.model))}"
            )
    if model.model not in _CHECKED:
        if found := nonfinite_weights(model.model):
            what = f"the logits are finite {_where(answers[0])}, but they are wrong"
            raise ModelError(f"{model.name}: {what}. {_remedy(found)}")
        _CHECKED.add(model.model)


def _where(answer: Completion) -> str:
    return f"at token {len(answer.token_ids) + 1} of the answer to prompt {answer.request.prompt_index + 1}"


def _remedy(found: str) -> str:
    if found:
        return f"These weights contain NaN or infinity: {found}. Use an earlier checkpoint or a new download."
    return (
        "All weights are finite, so a computation overflowed. Use --weights float32; if the weights are float32 "
        "already, use an earlier checkpoint."
    )
