"""Run all checks of `handspun verify` in order."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from handspun.models.load import ChatModel
from handspun.verification.answers import check_batches, check_beams, check_greedy, check_logits
from handspun.verification.int8 import check_int8
from handspun.verification.processors import check_distributions, check_draws, check_processors
from handspun.verification.reference import Finding, Reference, build_reference, engine_logits
from handspun.verification.training import check_packed, check_prefix

DEFAULT_PROMPTS = (
    "Name a color.",
    "Is 7 a prime number? Answer yes or no.",
    "Why is the sky blue? Answer in one sentence.",
    "请用一句话介绍上海。",
    "What does this function return for [3, 1, 2]?\n\n"
    "def f(values: list[int]) -> list[int]:\n"
    "    if len(values) < 2:\n"
    "        return values\n"
    "    first, *rest = values\n"
    "    return f([v for v in rest if v < first]) + [first] + f([v for v in rest if v >= first])\n",
    "Summarize this text in one sentence.\n\n"
    "The spinning wheel came to Europe in the Middle Ages, and for some centuries it stood in nearly every house. "
    "Before it there was the spindle: a stick with a weight, which a spinner set turning with one hand, while the "
    "other drew the fibers out. It took five to ten spinners to keep one weaver at work. The wheel turned the "
    "spindle by a cord, and so one hand became free, and the thread more even. In 1764 James Hargreaves, a weaver "
    "from Lancashire, put eight spindles into one frame, and a single wheel turned them all.",
)
"""Default prompts of `handspun verify`."""


def verify(
    chat: ChatModel,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    *,
    rounded: ChatModel | None = None,
    rounded_name: str = "",
    is_chat: bool = True,
    max_new_tokens: int = 16,
) -> Iterator[Finding]:
    """Compare Handspun with transformers, and with itself in other batches. Yield the findings of each check.

    Args:
        chat: The model in float32. Equality with transformers holds for float32 only.
        prompts: User messages, or plain texts with is_chat=False.
        rounded: The same model with other weights, to report how often they agree.
        rounded_name: Name of these weights, such as "int8".
        is_chat: Put the prompts into the chat template.
        max_new_tokens: Tokens per answer.

    Raises DataError, TemplateError or ConfigError for prompts that cannot be decoded.
    """
    material = build_reference(chat, prompts, is_chat=is_chat, max_new_tokens=max_new_tokens)
    yield check_logits(material)
    yield from check_greedy(material)
    yield from check_beams(material)
    yield from check_processors(material)
    yield from check_distributions(material)
    yield from check_draws(material)
    yield from check_batches(material, chat, "float32", exact=False)
    if rounded is not None:
        yield agreement(material, rounded, rounded_name)
        yield perplexities(material, chat, rounded, rounded_name)
        yield from check_batches(material, rounded, rounded_name, exact=_is_int8(rounded))
    yield from check_int8(chat.device)
    yield from check_packed(material)
    yield check_prefix(material)


def agreement(material: Reference, rounded: ChatModel, name: str) -> Finding:
    """Report how often rounded weights choose the same tokens as transformers in float32. It cannot fail."""
    logits = engine_logits(rounded, material.prompts, [answer.token_ids for answer in material.answers])
    chosen = torch.cat(logits).argmax(-1).tolist()
    expected = [token for answer in material.answers for token in answer.token_ids]
    same = sum(token == wanted for token, wanted in zip(chosen, expected, strict=True))
    found = f"{same} of {len(expected)} greedy choices as in float32 ({same / len(expected):.1%})"
    return Finding(check=name, case="compared with float32", status="info", found=found)


def perplexities(material: Reference, chat: ChatModel, rounded: ChatModel, name: str) -> Finding:
    """Report the perplexity of the prompts' own tokens under both weights. It cannot fail."""
    begun = [prompt[:1] for prompt in material.prompts if len(prompt) > 1]
    rest = [prompt[1:] for prompt in material.prompts if len(prompt) > 1]
    if not rest:
        return Finding(check=name, case="perplexity", status="info", found="all prompts are single tokens")
    targets = torch.tensor([token for tokens in rest for token in tokens])
    losses = [
        F.cross_entropy(torch.cat(engine_logits(one, begun, rest)).double().cpu(), targets).item()
        for one in (chat, rounded)
    ]
    exact, found = (math.exp(loss) for loss in losses)
    text = f"{found:.3f}, float32 {exact:.3f} ({found / exact - 1:+.1%}), over the prompts' {len(targets)} tokens"
    return Finding(check=name, case="perplexity", status="info", found=text)


def _is_int8(chat: ChatModel) -> bool:
    return chat.fused is not None and chat.fused.is_int8
