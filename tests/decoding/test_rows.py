"""The engine's rows of a job: long prompts go through in pieces, the limit on tokens is kept, and no row stays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from handspun.decoding import scheduler as scheduler_module
from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.generate import answer_all, prompt_progress
from handspun.decoding.scheduler import BatchLimits
from handspun.display import captured_log
from handspun.models.load import ChatModel
from parity import answers_to, requests_of
from tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 9, 13, 4, 6, 7, 10, 11], [8], [11, 6, 17, 9, 10, 12, 21, 5, 19, 4, 8, 15, 16], [7, 9, 5]]
ENGINES = ["fused", "transformers"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "drafted": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def chat_of(engine: str) -> ChatModel:
    """Under the name of another kind, the same weights are decoded by transformers."""
    model: Any = tiny_model("qwen2", vocab_size=24, pad_token_id=1)
    model.generation_config.eos_token_id = [3, 7]
    if engine == "transformers":
        model.config.model_type = "other"
    chat = ChatModel(model, tiny_tokenizer(), "tiny")
    assert isinstance(make_engine(chat), FusedEngine) == (engine == "fused")
    return chat


class Watch:
    """What the rows of the engines that are made hold, told after each forward pass."""

    def __init__(self, look: Callable[[dict[int, int]], None] = lambda _: None) -> None:
        self.rows: dict[int, int] = {}
        self.largest_feed = 0
        self.forwards = 0
        self._look = look

    def make_engine(self, chat: ChatModel, kv_tokens: int | None = None) -> Engine:
        engine: Any = make_engine(chat, kv_tokens)
        add, fork, free, forward = engine.add, engine.fork, engine.free, engine.forward
        truncate = engine.truncate

        def watched_add(tokens: int = 0) -> int:
            row: int = add(tokens)
            self.rows[row] = 0
            return row

        def watched_fork(row: int, tokens: int = 0) -> int:
            new: int = fork(row, tokens)
            self.rows[new] = self.rows[row]
            return new

        def watched_free(row: int) -> None:
            free(row)
            del self.rows[row]

        def watched_truncate(row: int, length: int) -> None:
            truncate(row, length)
            self.rows[row] = length

        def watched_forward(feeds: list[ModelInput]) -> torch.Tensor:
            logits: torch.Tensor = forward(feeds)
            self.forwards += 1
            for feed in feeds:
                self.rows[feed.row] += len(feed.token_ids)
                self.largest_feed = max(self.largest_feed, len(feed.token_ids))
            self._look(self.rows)
            return logits

        engine.add, engine.fork, engine.free, engine.truncate, engine.forward = (
            watched_add, watched_fork, watched_free, watched_truncate, watched_forward,
        )  # fmt: skip
        return engine


def watched(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> Watch:
    monkeypatch.setattr(scheduler_module, "make_engine", watch.make_engine)
    return watch


def ids_of(chat: ChatModel, **options: Any) -> list[list[int]]:
    return [answer.token_ids for answer in answers_to(chat, PROMPTS, max_new_tokens=12, **options)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_in_pieces_are_answered_as_whole_ones(
    engine: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 tokens: prompts of 13, 8, 3 and 1 are four pieces and a rest, two and a rest, just one, and less."""
    expected = ids_of(chat_of(engine), **MODES[mode])
    monkeypatch.setattr(scheduler_module, "_PROMPT_TOKENS", 3)
    watch = watched(monkeypatch, Watch())
    assert ids_of(chat_of(engine), **MODES[mode]) == expected
    assert watch.largest_feed <= 4  # a token and three drafted ones


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_row_is_left_after_a_job(
    engine: str, mode: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watched(monkeypatch, Watch())
    ids_of(chat_of(engine), batch_size=batch_size, **MODES[mode])
    assert watch.forwards > 3
    assert watch.rows == {}


@pytest.mark.parametrize("mode", ["greedy", "sampled", "drafted"])
@pytest.mark.parametrize("most", [26, 40, 60])
def test_rows_never_hold_more_than_the_limit_of_tokens(
    mode: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt and its answer are 13 + 12 tokens."""
    held: list[int] = []
    watch = watched(monkeypatch, Watch(lambda rows: held.append(sum(rows.values()))))
    chat = chat_of("fused")
    chat.model.generation_config.eos_token_id = []
    requests = requests_of(chat, PROMPTS, max_new_tokens=12, **MODES[mode])
    answers = answer_all(chat, requests, BatchLimits(tokens=most))
    assert {len(answer.token_ids) for answer in answers} == {12}
    assert max(held) <= most
    assert watch.forwards > 12  # they did not all go at once


@pytest.mark.parametrize("most", [75, 120, 1000])
def test_beams_never_hold_more_than_the_limit_of_tokens(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three beams of the longest prompt and its answer are 3 * (13 + 12) = 75 tokens."""
    together: list[int] = []
    watched(monkeypatch, Watch(lambda rows: together.append(len(rows))))
    chat = chat_of("fused")
    chat.model.generation_config.eos_token_id = []
    requests = requests_of(chat, PROMPTS, max_new_tokens=12, **MODES["beams"])
    assert len(answer_all(chat, requests, BatchLimits(tokens=most))) == 8
    # The tree has a row for each prompt. The limits of 12 tokens, times three: 60, 39, 75, 45.
    assert max(together) == {75: 1, 120: 2, 1000: 4}[most]


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_long_prompt_says_every_ten_seconds_where_it_is(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 3 tokens that take 4 seconds each: of 13 tokens, four pieces end at 4, 8, 12 and 16 seconds."""
    monkeypatch.setattr(scheduler_module, "_PROMPT_TOKENS", 3)
    chat = chat_of("fused")
    [request] = requests_of(chat, PROMPTS[2:3], max_new_tokens=2, **MODES[mode])
    assert len(request.prompt_token_ids) == 13
    times = iter(range(0, 100, 4))
    seconds = [0]

    def clock() -> float:
        return seconds[0]

    progress = prompt_progress(clock)

    def on_prompt(done: int, total: int) -> None:
        seconds[0] = next(times)
        progress(done, total)

    next(times)  # the first piece has taken 4 seconds
    with captured_log() as lines:
        answer_all(chat, [replace(request, on_prompt=on_prompt)])
    assert lines == ["prefill: 9 of 13 prompt tokens"]


@pytest.mark.parametrize(
    ("mode", "batch_size", "rows"),
    [
        ("greedy", 1, 1),
        ("greedy", 3, 3),
        ("sampled", 3, 3),
        ("drafted", 2, 2),
        ("beams", 1, 1),  # a search is never cut
        ("beams", 3, 1),
        ("beams", 5, 1),
        ("beams", 6, 2),
        ("beams", 12, 4),
    ],
)
def test_no_more_answers_or_beams_than_the_batch_size_are_decoded_at_a_time(
    mode: str, batch_size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused engine has a row for each answer, and for the three beams of a prompt."""
    together: list[int] = []
    watched(monkeypatch, Watch(lambda held: together.append(len(held))))
    chat = chat_of("fused")
    chat.model.generation_config.eos_token_id = []
    ids_of(chat, batch_size=batch_size, **MODES[mode])
    assert max(together) == rows
