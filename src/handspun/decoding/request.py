"""`Request`: everything one call of `generate` works with. `Completion`: one answer while it is being written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakSet

import torch
from torch import Tensor, nn

from handspun.decoding.constraint import make_constraint
from handspun.decoding.explain import Explanation
from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import Function, Processor, make_processors
from handspun.decoding.results import FinishReason, GenerationChunk, GenerationResult
from handspun.decoding.text import StreamingText, Vocabulary
from handspun.decoding.tool_calls import parse_tool_calls
from handspun.errors import ModelError
from handspun.models.load import ChatModel, nonfinite_weights


@dataclass(frozen=True)
class Request:
    """The model, options, prompts and limits of one call of `generate`."""

    model: ChatModel
    options: SamplingParams
    vocabulary: Vocabulary
    prompts: list[list[int]]
    """Token ids of each prompt."""
    limits: list[int]
    """Maximum number of new tokens per prompt."""
    logprobs: bool
    with_tools: bool
    batch_size: int
    max_batch_tokens: int
    should_stop: Callable[[], bool]
    functions: tuple[Function, ...] = ()
    """The user's custom processors."""
    penalized: list[list[int]] | None = None
    """Tokens of each prompt that the repetition penalty counts. None counts all."""
    explain: bool = False
    show_tree: bool = False
    on_prompt: Callable[[int, int], None] | None = None
    """Called with (tokens prefilled, prompt tokens) as a long prompt progresses."""

    @cached_property
    def processors(self) -> tuple[Processor, ...]:
        """The logits processors that the options ask for. Raises ConfigError if the constraint cannot be met."""
        constraint = make_constraint(self.options, self.model.tokenizer)
        return make_processors(self.options, self.functions, constraint)


@dataclass
class Completion:
    """The tokens and the text of one answer so far."""

    job: Request
    prompt_index: int
    return_index: int
    text: StreamingText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    explanation: list[Explanation] = field(default_factory=list)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def start(cls, job: Request, prompt_index: int, return_index: int = 0) -> "Completion":
        """Return an answer without tokens."""
        return cls(job, prompt_index, return_index, StreamingText.start(job.vocabulary, job.options.stop_strings))

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.job.prompts[self.prompt_index]

    @property
    def max_total_tokens(self) -> int:
        """Number of prompt and answer tokens when the answer reaches its limit."""
        return len(self.prompt_token_ids) + self.job.limits[self.prompt_index]

    @property
    def prompt_ids_for_penalty(self) -> list[int]:
        """Prompt tokens that the repetition penalty counts."""
        return (self.job.penalized or self.job.prompts)[self.prompt_index]

    def copy(self) -> "Completion":
        """Return an independent copy, so that a beam can branch."""
        return replace(self, text=self.text.copy(), token_ids=list(self.token_ids), logprobs=list(self.logprobs))

    def add(self, token_id: int, logprob: float | None = None) -> GenerationChunk:
        """Add a token. End the answer at an eos, a stop string or its limit, checked in that order."""
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self.job.options.eos_token_ids:
            return self.finish("eos", token_id)
        shown = self.text.push(token_id)
        if self.text.stop_string is not None or len(self.token_ids) == self.job.limits[self.prompt_index]:
            return self.finish("length", token_id, shown)
        return GenerationChunk(
            prompt_index=self.prompt_index, return_index=self.return_index, text=shown, token_ids=[token_id]
        )

    def finish(self, reason: FinishReason, token_id: int | None = None, shown: str = "") -> GenerationChunk:
        """End the answer. Emit its buffered text, unless that completes a stop string."""
        shown += self.text.finish()
        self.finish_reason = "stop" if self.text.stop_string is not None else reason
        return GenerationChunk(
            prompt_index=self.prompt_index,
            return_index=self.return_index,
            text=shown,
            token_ids=[] if token_id is None else [token_id],
            finish_reason=self.finish_reason,
            result=self.result(),
        )

    def result(self) -> GenerationResult:
        """Return the finished answer as the user gets it."""
        assert self.finish_reason is not None
        return GenerationResult(
            text=self.text.text,
            token_ids=self.token_ids,
            prompt_token_ids=self.prompt_token_ids,
            finish_reason=self.finish_reason,
            stop_string=self.text.stop_string,
            logprobs=self.logprobs if self.job.logprobs else None,
            explanation=self.explanation if self.job.explain else None,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            prompt_index=self.prompt_index,
            return_index=self.return_index,
            tool_calls=parse_tool_calls(self.text.text)[1] if self.job.with_tools else [],
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
    return f"at token {len(answer.token_ids) + 1} of the answer to prompt {answer.prompt_index + 1}"


def _remedy(found: str) -> str:
    if found:
        return f"These weights contain NaN or infinity: {found}. Use an earlier checkpoint or a new download."
    return (
        "All weights are finite, so a computation overflowed. Use --weights float32; if the weights are float32 "
        "already, use an earlier checkpoint."
    )
