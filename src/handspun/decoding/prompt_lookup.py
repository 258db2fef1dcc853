"""Prompt lookup: draft the tokens that followed an earlier occurrence of the answer's last tokens.

Answers that summarize, correct or rewrite their prompt repeat parts of it. A forward pass over several tokens
reads the same weights as one over a single token. So the draft is fed after the newest token, and each position
chooses its token as usual. As long as that equals the draft token, the next position's logits are valid too.

The noise of a draw depends only on the answer and the step, so sampled answers are the same token for token. The
acceptance rule of Leviathan et al. 2022 (arXiv:2211.17192) would only preserve their distribution.

Drafting follows prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) with
transformers' rules (`PromptLookupCandidateGenerator`, 5.23).
"""

from collections.abc import Sequence
from itertools import takewhile

from handspun.decoding.request import Completion


def lookup(token_ids: Sequence[int], *, num_tokens: int, max_ngram_size: int) -> list[int]:
    """Return up to num_tokens tokens that followed an earlier occurrence of the last tokens, or none.

    The longest matching n-gram counts, of at most max_ngram_size tokens, and its first occurrence.
    """
    for size in range(min(max_ngram_size, len(token_ids) - 1), 0, -1):
        ngram = token_ids[-size:]
        for start in range(len(token_ids) - size):
            if token_ids[start] == ngram[0] and token_ids[start : start + size] == ngram:
                return list(token_ids[start + size : start + size + num_tokens])
    return []


def draft(answer: Completion) -> list[int]:
    """Return draft tokens for the answer, up to its limit and without an eos, after which nothing is chosen."""
    options = answer.request.options
    # One less than the limit allows: a step also chooses a token after the draft.
    room = answer.request.max_new_tokens - len(answer.token_ids) - 1
    num_tokens = min(options.prompt_lookup_num_tokens, room)
    if num_tokens < 1:
        return []
    token_ids = [*answer.prompt_token_ids, *answer.token_ids]
    found = lookup(token_ids, num_tokens=num_tokens, max_ngram_size=options.max_matching_ngram_size)
    return list(takewhile(lambda token: token not in options.eos_token_ids, found))
