"""One answer while it is being written, and the job that it is part of."""

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
    """All that one call of `generate` works with."""

    model: ChatModel
    options: SamplingParams
    vocabulary: Vocabulary
    prompts: list[list[int]]
    """Token ids of each prompt."""
    limits: list[int]
    """Most new tokens for each prompt."""
    logprobs: bool
    with_tools: bool
    batch_size: int
    max_batch_tokens: int
    should_stop: Callable[[], bool]
    functions: tuple[Function, ...] = ()
    """The user's own processors."""
    penalized: list[list[int]] | None = None
    """Tokens of each prompt that the repetition penalty counts, if not all."""
    explain: bool = False
    show_tree: bool = False
    on_prompt: Callable[[int, int], None] | None = None
    """Told how many tokens of how many of a long prompt have been read."""

    @cached_property
    def processors(self) -> tuple[Processor, ...]:
        """What the options ask to be done to logits. Raises ConfigError for a constraint that cannot be met."""
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
        """An answer that has no token yet."""
        return cls(job, prompt_index, return_index, StreamingText.start(job.vocabulary, job.options.stop_strings))

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt that is answered."""
        return self.job.prompts[self.prompt_index]

    @property
    def max_total_tokens(self) -> int:
        """Of prompt and answer, once it is as long as it may get."""
        return len(self.prompt_token_ids) + self.job.limits[self.prompt_index]

    @property
    def prompt_ids_for_penalty(self) -> list[int]:
        """Those of the prompt's tokens that the repetition penalty counts."""
        return (self.job.penalized or self.job.prompts)[self.prompt_index]

    def copy(self) -> "Completion":
        """The same answer, to go on from in another way."""
        return replace(self, text=self.text.copy(), token_ids=list(self.token_ids), logprobs=list(self.logprobs))

    def add(self, token_id: int, logprob: float | None = None) -> GenerationChunk:
        """Adds a token, and ends the answer if it is at an eos, a stop string or its limit, in that order."""
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
        """Ends the answer; what was held back of its text is shown, or completes a stop string after all."""
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
        """The ended answer as the user gets it."""
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
"""Models whose weights have been looked at: once is enough, and takes as long as a step."""


def check_finite(logits: Tensor, answers: Sequence[Completion], model: ChatModel) -> None:
    """Raise ModelError if any of the model's logits is NaN or infinite. logits: (answers, vocab).

    Attention hides NaN in some weights behind finite logits (a NaN in its softmax counts as 0), so the weights are
    looked at too, at the first step of a model's first answers.
    """
    if not bool(torch.isfinite(logits.sum())):  # one pass over them; only what is not finite is looked at again
        wrong = (~torch.isfinite(logits)).sum(-1).tolist()
        if any(wrong):  # or they are large, and their sum overflowed
            row = next(i for i, count in enumerate(wrong) if count)
            what = f"{wrong[row]:,} of the model's {logits.shape[-1]:,} logits are NaN or infinite"
            raise ModelError(
                f"{model.name}: {what}, {_where(answers[row])}. {_cause(nonfinite_weights(model.model))}"
            )
    if model.model not in _CHECKED:
        if found := nonfinite_weights(model.model):
            what = f"the logits are finite {_where(answers[0])}, but cannot be right"
            raise ModelError(f"{model.name}: {what}. {_cause(found)}")
        _CHECKED.add(model.model)


def _where(answer: Completion) -> str:
    return f"at token {len(answer.token_ids) + 1} of the answer to prompt {answer.prompt_index + 1}"


def _cause(found: str) -> str:
    if found:
        return (
            f"These weights hold NaN or infinity: {found}. Use an earlier checkpoint, or download the model again."
        )
    return (
        "All weights are finite, so a number overflowed on the way: use --weights float32, and if that is what it "
        "is, an earlier checkpoint."
    )
