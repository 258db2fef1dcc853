"""What the contenders of decode.py are asked: prompts through the model's chat template, no two of them alike."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handspun.data.chat_template import ChatTemplate

QUESTIONS = [
    "Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.",
    "What is the sum of the first 100 natural numbers? Please think step by step.",
    "List three tips for staying healthy.",
    "Explain photosynthesis to a child.",
    "Write a short poem about rain.",
    "Name the planets.",
    "How do I make tea?",
]


@dataclass(frozen=True)
class Column:
    """What is decoded at a time."""

    prompts: int = 1
    beams: int = 1
    tokens: int | None = None
    """Of each prompt; as many as it happens to have if None."""
    is_prefill: bool = False
    """One new token, in seconds."""
    streamed: bool = False
    """Token by token: seconds to the first one, and tokens a second after it."""


def prompts_of(column: Column, template: ChatTemplate, batches: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of prompts, each with its text and ids. Numbers in front make them all different from early on."""
    for batch in range(batches):
        numbers = range(batch * column.prompts, (batch + 1) * column.prompts)
        texts = [f"{number + 1}. {QUESTIONS[number % column.prompts % len(QUESTIONS)]}" for number in numbers]
        if column.tokens is not None:
            texts = [lengthened(f"{number + 1}.", column.tokens, template) for number in numbers]
        yield [{"text": text, "ids": ids_of(text, template)} for text in texts]


def lengthened(text: str, length: int, template: ChatTemplate) -> str:
    """The text with words behind it, so that the prompt has `length` tokens."""
    while (missing := length - len(ids_of(text, template))) > 0:
        text += " and" * max(1, missing // 4)  # four bytes, and so four tokens at most
    if missing < 0:
        raise SystemExit(f"the shortest prompts have {length - missing} tokens: expected at most {length}")
    return text


def ids_of(text: str, template: ChatTemplate) -> list[int]:
    """Through the chat template."""
    return template.encode_prompt([{"role": "user", "content": text}])


def end_ids(template: ChatTemplate, folder: Path) -> list[int]:
    """All that end an answer in one of the engines: the end of turn, and what the tokenizer and the model's files
    call an end, a beginning or padding."""
    ids = {template.end_of_turn_id}
    tokenizer = template.tokenizer
    ids |= {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
                value = config.get(key)
                ids |= set(value) if isinstance(value, list) else {value}
    return sorted(ids - {None})
