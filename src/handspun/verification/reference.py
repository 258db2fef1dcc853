"""What transformers' own `generate` gives, one prompt at a time, so that there is no padding in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from handspun.models.quiet import quiet


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


__all__ = ["ReferenceAnswer", "next_logprobs", "reference_answer", "reference_beams"]
