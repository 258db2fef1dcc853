"""The embedded model's int8 logits, recorded: the same bits on every CPU and with every set of kernels."""

import hashlib

import pytest

from backends import NATIVE, chosen
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.fused import FusedEngine
from handspun.models.direct import FileTokenizer, load_int8_directly
from handspun.models.load import load

TEXTS = ["Name a color.", "请用一句话介绍上海。", "Why is the sky blue? " * 20]
TOKENS = [
    [198, 198, 504, 1517, 868, 1003, 253],
    [198, 198, 19, 216, 34, 32, 33],
    [198, 504, 2988, 288, 451, 1962, 314],
]
DIGEST = "9b2a194fe4089625fab5ef345f32ef4f9f18bb431d027a77b495cf70a36d4705"
"""Of the logits of three prompts in one pass, and of six greedy tokens each. Only what changes int8's arithmetic
changes it: then record the new one."""


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.cpu
@pytest.mark.parametrize("name", NATIVE)
def test_int8_logits_are_those_recorded(name: str) -> None:
    with chosen(name):
        chat = load("smollm2-135m", weights="int8", int8_loader=load_int8_directly)
        assert isinstance(chat.tokenizer, FileTokenizer)  # not through transformers
        assert chat.fused is not None
        engine = FusedEngine(chat.fused)
    feeds = [ModelInput(engine.add(), list(chat.tokenizer(text)["input_ids"])) for text in TEXTS]
    rows, digest = [feed.row for feed in feeds], hashlib.sha256()
    tokens: list[list[int]] = [[] for _ in rows]
    for _ in range(7):
        logits = engine.forward(feeds)
        digest.update(logits.numpy().tobytes())
        for row, token in enumerate(logits.argmax(-1).tolist()):
            tokens[row].append(token)
        feeds = [ModelInput(row, [found[-1]]) for row, found in zip(rows, tokens, strict=True)]
    assert tokens == TOKENS
    assert digest.hexdigest() == DIGEST
