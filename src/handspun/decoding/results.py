"""What decoding gives back."""

from dataclasses import dataclass, field
from typing import Any, Literal

from handspun.decoding.explain import Explanation, TreeNode

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One answer to one prompt."""

    text: str
    """Without special tokens, cut at the stop string that fired."""
    token_ids: list[int]
    """All that was generated, up to and with the eos."""
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    """"eos"; "stop", a stop string fired; "length", max_new_tokens or the model's context is used up;
    "cancelled", the caller asked to stop."""
    stop_string: str | None = None
    """The stop string that fired."""
    logprobs: list[float] | None = None
    """On request: natural log-probability of each token, in the model's own distribution."""
    explanation: list[Explanation] | None = None
    """On request: how each token came to be."""
    tree: list[TreeNode] | None = None
    """On request, with a prompt's best answer: what its beam search looked at."""
    drafted_tokens: int = 0
    """With prompt_lookup_num_tokens: tokens that were drafted for the answer."""
    accepted_tokens: int = 0
    """Those of them that were chosen. Each saved a step."""
    prompt_index: int = 0
    """Which of the prompts, from 0."""
    return_index: int = 0
    """Which of the prompt's num_return_sequences answers, from 0; beams come with the best first."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls parsed from the text if tools were given:
    {"type": "function", "function": {"name": str, "arguments": dict}}."""


@dataclass(frozen=True, kw_only=True)
class GenerationChunk:
    """What is added to one answer. The texts of an answer's chunks, end to end, are its text."""

    prompt_index: int
    return_index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    """Set on an answer's last chunk."""
    result: GenerationResult | None = None
    """The whole answer, on its last chunk."""
