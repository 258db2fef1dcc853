"""The results of decoding: `GenerationResult` and `GenerationChunk`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from handspun.decoding.explain import Explanation, TreeNode

FinishReason = Literal["eos", "stop", "length", "cancelled"]
TopLogprobs = list[tuple[int, float]]
"""Token ids with their natural log-probabilities in the model's own distribution."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One answer to one prompt."""

    text: str
    """The answer's text without special tokens, cut at the stop string that fired."""
    token_ids: list[int]
    """All generated tokens, eos included."""
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    """"eos"; "stop": a stop string fired; "length": max_new_tokens or the model's context is used up;
    "cancelled": the caller asked to stop."""
    stop_string: str | None = None
    """The stop string that fired."""
    logprobs: list[float] | None = None
    """On request: natural log-probability of each token in the model's own distribution."""
    top_logprobs: list[TopLogprobs] | None = None
    """On request: the most probable tokens of each step, best first."""
    prompt_logprobs: list[float | None] | None = None
    """On request: the same of the prompt's tokens. None for the first, which nothing precedes."""
    prompt_ranks: list[int | None] | None = None
    """With prompt_logprobs: each token's rank in that distribution; 1 is the most probable token."""
    prompt_top_logprobs: list[TopLogprobs] | None = None
    """With prompt_logprobs and top_logprobs: the most probable tokens in each place; none for the first."""
    cached_tokens: int = 0
    """Number of prompt tokens whose keys and values were known from earlier requests."""
    explanation: list[Explanation] | None = None
    """On request: how each token was chosen."""
    tree: list[TreeNode] | None = None
    """On request, with a prompt's best answer: the tree that its beam search explored."""
    drafted_tokens: int = 0
    """With prompt_lookup_num_tokens: number of draft tokens."""
    accepted_tokens: int = 0
    """Number of draft tokens that were accepted. Each saved a step."""
    prompt_index: int = 0
    """Index of the prompt, from 0."""
    return_index: int = 0
    """Index among the prompt's num_return_sequences answers, from 0; with beam search the best comes first."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls parsed from the text if tools were given:
    {"type": "function", "function": {"name": str, "arguments": dict}}."""

    def __repr__(self) -> str:
        """Return the text and how it ended; the ids would fill a notebook's cell."""
        tokens = len(self.token_ids)
        return f"GenerationResult({self.text!r}, {tokens} token{'s'[: tokens != 1]}, {self.finish_reason})"


@dataclass(frozen=True, kw_only=True)
class GenerationChunk:
    """An addition to one answer. The texts of an answer's chunks, concatenated, are its text."""

    prompt_index: int
    return_index: int
    text: str
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    """On request: log-probabilities of token_ids."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """On request: the most probable tokens in the place of each of token_ids, best first."""
    tree_nodes: list[TreeNode] = field(default_factory=list)
    """With show_tree: what the last step added to the tree of the beam search. Their indices go on from those of
    earlier chunks."""
    finish_reason: FinishReason | None = None
    """Set on an answer's last chunk."""
    result: GenerationResult | None = None
    """The whole answer, on its last chunk."""
