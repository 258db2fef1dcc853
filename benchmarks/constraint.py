"""What it takes to know which tokens a JSON schema allows: llguidance, and xgrammar where it is installed.

    python benchmarks/constraint.py [--model Qwen/Qwen2.5-0.5B]

Over the tokens of one answer; microseconds a token for the mask and for taking the token in, median and highest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

import handspun

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ANSWER = {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry — 诗"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    tokenizer = handspun.load(parser.parse_args().model).tokenizer
    ids = tokenizer(json.dumps(ANSWER, ensure_ascii=False, separators=(",", ":")))["input_ids"]
    print(f"{len(tokenizer)} tokens in the vocabulary, {len(ids)} in the answer")
    start = time.perf_counter()
    table = from_tokenizer(tokenizer)
    print(f"llguidance: vocabulary {time.perf_counter() - start:.2f} s", end=", ")
    matcher = LLMatcher(table, LLMatcher.grammar_from_json_schema(SCHEMA))
    report(ids, matcher.compute_bitmask, matcher.consume_token)
    if find_spec("xgrammar"):
        import xgrammar

        start = time.perf_counter()
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
        print(f"xgrammar {version('xgrammar')}: vocabulary {time.perf_counter() - start:.2f} s", end=", ")
        other = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA)))
        mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        report(ids, lambda: other.fill_next_token_bitmask(mask), other.accept_token)


def report(ids: list[int], mask: Callable[[], Any], take: Callable[[int], bool]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for token in ids:
        start = time.perf_counter()
        mask()
        middle = time.perf_counter()
        assert take(token)
        times[0].append(1e6 * (middle - start))
        times[1].append(1e6 * (time.perf_counter() - middle))
    cells = [
        f"{what} {statistics.median(t):.0f} us ({max(t):.0f})"
        for what, t in zip(("mask", "token"), times, strict=True)
    ]
    print(", ".join(cells))


if __name__ == "__main__":
    main()
