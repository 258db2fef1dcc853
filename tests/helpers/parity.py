"""Comparison with transformers' own `generate`, token for token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.config import GenerationOptions
from handspun.decoding.generate import answer_all
from handspun.decoding.options import resolve
from handspun.decoding.processors import make_processors
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationResult
from handspun.decoding.scheduler import BatchLimits
from handspun.decoding.text import vocabulary
from handspun.models.load import ChatModel


def assert_same_as_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_ids: list[list[int]],
    *,
    eos_token_ids: list[int] | None = None,
    pad_token_id: int | None = None,
    **options: Any,
) -> list[GenerationResult]:
    """Both decode the same prompts, and must give the same token ids. Returns our answers.

    eos_token_ids, pad_token_id: in place of the model's own, for both.
    """
    saved = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    eos, pad = eos_token_ids or saved[0], saved[1] if pad_token_id is None else pad_token_id
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    try:
        ours = answers_to(ChatModel(model, tokenizer, "model"), prompts_ids, **options)
        theirs = transformers_answers(model, tokenizer, prompts_ids, **options)
    finally:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = saved
    assert [answer.token_ids for answer in ours] == theirs
    return ours


def answers_to(
    model: ChatModel, prompts_ids: list[list[int]], *, batch_size: int = 64, logprobs: bool = False, **options: Any
) -> list[GenerationResult]:
    """Our answers to prompts that are given as token ids."""
    requests = requests_of(model, prompts_ids, logprobs=logprobs, **options)
    return answer_all(model, requests, BatchLimits(rows=batch_size, tokens=10**6))


def requests_of(
    model: ChatModel, prompts_ids: list[list[int]], *, logprobs: bool = False, **options: Any
) -> list[Request]:
    """What `generate` would make of prompts that are given as token ids."""
    resolved, _ = resolve(GenerationOptions(**options), model, chat=False)
    processors, words = make_processors(resolved), vocabulary(model.tokenizer)
    return [
        Request(
            prompt_token_ids=ids,
            options=resolved,
            vocabulary=words,
            max_new_tokens=resolved.max_new_tokens,
            prompt_index=number,
            processors=processors,
            logprobs=logprobs,
        )
        for number, ids in enumerate(prompts_ids)
    ]


def transformers_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts_ids: list[list[int]], **options: Any
) -> list[list[int]]:
    """transformers' answers to all prompts in one batch, each cut behind its eos or stop string."""
    length = max(map(len, prompts_ids))
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    assert pad is not None
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts_ids])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts_ids])
    options = {"do_sample": False, **options}
    stops = options.get("stop_strings", ())
    if stops:
        options |= {"stop_strings": list(stops), "tokenizer": tokenizer}
    output = model.generate(ids, attention_mask=mask, **options)[:, length:].tolist()
    eos = eos if isinstance(eos, list) else [eos]
    return [_cut_behind_end(row, eos, lambda ids: str(tokenizer.decode(ids)), stops) for row in output]


def _cut_behind_end(
    ids: list[int], eos: list[int | None], decode: Callable[[list[int]], str], stops: Sequence[str]
) -> list[int]:
    for end in range(1, len(ids) + 1):
        if ids[end - 1] in eos or (stops and any(stop in decode(ids[:end]) for stop in stops)):
            return ids[:end]
    return ids
