"""Prompt-lookup speculation: what followed an answer's last tokens the time before is drafted, and checked in one
step.

Answers that summarize, correct or rewrite their prompt repeat pieces of it. A step over several tokens reads the
same weights as a step over one. So the draft is fed behind the newest token, and at every position the token is
chosen that would be chosen there anyway. As long as that is the drafted one, the next position's logits are those
of the next step. Noise depends on the answer and the step alone, so that sampled answers stay the same, token for
token; the rule of Leviathan et al. 2022 (arXiv:2211.17192) keeps only their distribution.

Drafting is prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) with
transformers' rules (`PromptLookupCandidateGenerator`, 5.23).
"""

from collections.abc import Sequence
from itertools import takewhile

from handspun.decoding.request import Completion


def lookup(token_ids: Sequence[int], *, num_tokens: int, max_ngram_size: int) -> list[int]:
    """The tokens, num_tokens at most, that followed the last ones where these stood before; none if they did not.

    The longest run that is found counts, max_ngram_size tokens at most; and of several places the first.
    """
    for size in range(min(max_ngram_size, len(token_ids) - 1), 0, -1):
        ngram = token_ids[-size:]
        for start in range(len(token_ids) - size):
            if token_ids[start] == ngram[0] and token_ids[start : start + size] == ngram:
                return list(token_ids[start + size : start + size + num_tokens])
    return []


def draft(answer: Completion) -> list[int]:
    """What may come next in the answer: short of its limit by the token that is chosen behind the draft, and of an
    eos, behind which there is nothing to choose."""
    options = answer.job.options
    room = answer.max_total_tokens - len(answer.prompt_token_ids) - len(answer.token_ids) - 1
    num_tokens = min(options.prompt_lookup_num_tokens, room)
    if num_tokens < 1:
        return []
    token_ids = [*answer.prompt_token_ids, *answer.token_ids]
    found = lookup(token_ids, num_tokens=num_tokens, max_ngram_size=options.max_matching_ngram_size)
    return list(takewhile(lambda token: token not in options.eos_token_ids, found))
