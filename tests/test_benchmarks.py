"""The benchmarks' own arithmetic, command lines, and the contender that is Handspun."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import decode
import decode_tables
import memory_bandwidth
import time_to_quality
from decode_prompts import Column, end_ids, prompts_of
from handspun.data.examples import build_examples
from handspun.data.rows import Row
from handspun.models.load import ChatModel
from measurements import Results

ROOT = Path(__file__).parents[1]
CONTENDERS = ROOT / "benchmarks" / "contenders"


def commands_of_decode() -> list[list[str]]:
    """As they stand in the documents and in the script's own head."""
    texts = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    lines = re.findall(r"^ +python benchmarks/decode\.py(.*)$", "\n".join([*texts, decode.__doc__]), re.MULTILINE)
    return [shlex.split(re.sub(r"[\[\]]", "", line)) for line in lines]


@pytest.mark.parametrize("words", commands_of_decode(), ids=" ".join)
def test_documented_command_lines_parse(words: list[str]) -> None:
    assert set(decode.parse(words).only or []) <= set(decode.CONTENDERS)


def test_no_prompt_begins_as_another_does(tiny_chat: ChatModel) -> None:
    """An engine that keeps the prompts it has read is not to find them again."""
    batches = list(prompts_of(Column(8), tiny_chat.template, 3))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len({prompt["text"].split()[0] for batch in batches for prompt in batch}) == 24


@pytest.mark.parametrize("column", [Column(tokens=41), Column(2, tokens=300)], ids=str)
def test_prompts_are_of_the_length_that_the_table_names(column: Column, tiny_chat: ChatModel) -> None:
    prompts = [prompt for batch in prompts_of(column, tiny_chat.template, 2) for prompt in batch]
    assert {len(prompt["ids"]) for prompt in prompts} == {column.tokens}
    assert len({prompt["text"].split()[0] for prompt in prompts}) == len(prompts)
    assert all(
        tiny_chat.template.encode_prompt([{"role": "user", "content": p["text"]}]) == p["ids"] for p in prompts
    )


def test_a_length_that_no_prompt_has_is_an_error(tiny_chat: ChatModel) -> None:
    with pytest.raises(SystemExit, match="expected at most 3"):
        list(prompts_of(Column(tokens=3), tiny_chat.template, 1))


def test_what_ends_an_answer_in_any_engine_is_excluded(tiny_chat: ChatModel, tmp_path: Path) -> None:
    """<|im_end|>, <|endoftext|> as padding, and what the model's files name."""
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 9], "bos_token_id": null}', encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11}', encoding="utf-8")
    named = map(tiny_chat.tokenizer.convert_tokens_to_ids, ["<|endoftext|>", "<|im_end|>"])
    assert end_ids(tiny_chat.template, tmp_path) == [7, 9, 11, *named]


def run_of(name: str, **figures: Any) -> dict[str, Any]:
    return {
        "engine": name,
        "weights": "w",
        "bytes_a_token": 500_000_000,
        "peak_gb": 1.0,
        "ids": [1, 2, 3],
        **figures,
    }


def results_in(folder: Path) -> Results:
    return Results(folder / "results.json", {"settings": {"new_tokens": 48, "threads": 2}})


def test_rates_and_ratios_to_the_best_peer_with_weights_as_long(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    for name, seconds in {"CTranslate2": [6.0, 4.0], "OpenVINO GenAI": [2.0], "Handspun, int8": [1.0]}.items():
        tokens = [8 * 48] * len(seconds)
        results.add(decode_tables.key(name, "8 rows"), run_of(name, seconds=seconds, tokens=tokens))
        tenth = [value / 10 for value in seconds]
        results.add(decode_tables.key(name, "prefill"), run_of(name, seconds=tenth, tokens=[1] * len(seconds)))
    results.add(decode_tables.key("Handspun", "8 rows"), run_of("Handspun", seconds=[3.0], tokens=[8 * 48]))
    assert decode_tables.rates(results, "CTranslate2", "8 rows") == [64.0, 96.0]  # 8 * 48 tokens
    assert decode_tables.rate_cell(results, "CTranslate2", "8 rows") == "80.0 (64.0-96.0)"
    # 384 and 80 to 192 tokens a second, and 0.1 and 0.5 to 0.2 seconds
    for title in ("8 rows", "prefill"):
        assert decode_tables.ratio(results, "Handspun, int8", title) == "2.00"
    assert decode_tables.ratio(results, "Handspun, int8", "1 row") == ""
    assert decode_tables.ratio(results, "Handspun", "8 rows") == ""  # transformers alone has float32 weights
    results.add(decode_tables.key("transformers", "8 rows"), run_of("transformers", seconds=[6.0], tokens=[384]))
    assert decode_tables.ratio(results, "Handspun", "8 rows") == "2.00"
    assert "3 of 3" in decode_tables.summary(results)


def test_tokens_that_were_not_made_do_not_count(tmp_path: Path) -> None:
    """One of four beam searches ended after 24 of its 48 tokens."""
    results, title = results_in(tmp_path), "4 beams, 4 prompts"
    results.add(
        decode_tables.key("CTranslate2", title), run_of("CTranslate2", seconds=[2.0], tokens=[3 * 48 + 24])
    )
    results.add(decode_tables.key("Handspun", title), run_of("Handspun", seconds=[2.0], tokens=[4 * 48]))
    assert decode_tables.rate_cell(results, "CTranslate2", title) == "84.0*"
    assert decode_tables.rate_cell(results, "Handspun", title) == "96.0"


def test_the_share_of_what_reading_the_weights_allows(tmp_path: Path) -> None:
    """20 GB/s over half a gigabyte a token are 40 tokens a second."""
    results = results_in(tmp_path)
    results.add(decode_tables.BANDWIDTH, {"gb_a_second": [19.0, 20.0, 21.0]})
    results.add(decode_tables.key("Handspun", "first token"), run_of("Handspun", first=[0.25], rates=[30.0]))
    printed = decode_tables.summary(results)
    assert "| Handspun | w | 0.500 | 40.0 | 30.0 | 75% |" in printed
    assert "20.0 (19.0-21.0) GB/s" in printed
    assert decode_tables.shown(results, "Handspun", "first token") == "0.250 s, then 30.0 tokens/s"


def test_bandwidth_is_measured_with_the_threads_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bandwidth, "READ", 2**20)
    before = torch.get_num_threads()
    found = memory_bandwidth.read_bandwidth(1, repetitions=3)
    assert len(found) == 3
    assert min(found) > 0
    assert torch.get_num_threads() == before


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(CONTENDERS)
    return CONTENDERS


def printed_by(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["handspun_decode.py", json.dumps(job)])
    import handspun_decode

    handspun_decode.main()
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.usefixtures("contenders")
def test_handspun_decodes_the_tokens_that_are_asked_for(
    beams: int,
    tiny_folder: Path,
    tiny_chat: ChatModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the very prompts that the peers get as ids."""
    job = job_in(tmp_path, tiny_folder, tiny_chat, Column(2)) | {"beams": beams}
    run = printed_by(job, monkeypatch, capsys)
    assert len(run["seconds"]) == 2  # the first batch warms up
    assert run["tokens"] == [8, 8]
    assert len(run["ids"]) == 4
    assert not set(run["ids"]) & set(job["end_ids"])


@pytest.mark.usefixtures("contenders")
def test_a_streamed_answer_is_timed_from_its_first_token(
    tiny_folder: Path,
    tiny_chat: ChatModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_in(tmp_path, tiny_folder, tiny_chat, Column(streamed=True)) | {"streamed": True}
    run = printed_by(job, monkeypatch, capsys)
    assert len(run["first"]) == len(run["rates"]) == 2
    assert min(*run["first"], *run["rates"]) > 0
    weights = sum(weight.numel() for weight in tiny_chat.model.parameters())  # the head is the embedding
    assert run["bytes_a_token"] == 4 * weights


def job_in(folder: Path, model: Path, chat: ChatModel, column: Column) -> dict[str, Any]:
    batches = list(prompts_of(column, chat.template, 3))
    (folder / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
    return {
        "model": str(model),
        "batches": str(folder / "batches.json"),
        "new_tokens": 4,
        "end_ids": end_ids(chat.template, model),
        "threads": 1,
        "options": {"weights": "float32"},
    }


def test_seconds_to_reach_is_on_the_line_between_two_evaluations() -> None:
    curve = [(0.0, 2.0), (10.0, 1.8), (20.0, 1.9), (40.0, 1.5)]
    reached = [time_to_quality.seconds_to_reach(curve, loss) for loss in (2.5, 1.9, 1.8, 1.6, 1.5, 1.4)]
    assert reached == pytest.approx([0.0, 5.0, 10.0, 35.0, 40.0, None])


def test_target_of_is_the_lowest_last_loss_of_trl_and_when_it_is_first_reached() -> None:
    curves = {
        "Handspun, full": [(0.0, 2.0), (4.0, 1.2)],
        "TRL, full": [(0.0, 2.0), (10.0, 1.5), (20.0, 1.6)],
        "TRL, LoRA": [(0.0, 2.0), (40.0, 1.55)],
    }
    target, seconds = time_to_quality.target_of(curves)
    assert (target, seconds) == (1.55, pytest.approx(9.0))


def test_points_are_evenly_spread_and_end_with_the_last_step() -> None:
    task = time_to_quality.Task("rows", 397, {"batch_size": 8}, "")
    assert task.steps() == 50
    assert task.points(6) == [8, 16, 24, 32, 40, 48, 50]
    assert task.points(1) == [50]


def test_find_rate_doubles_until_the_loss_is_no_lower(tmp_path: Path) -> None:
    """All that it asks for are saved runs: it would start one for 8e-4, and none is there."""
    results, task = results_in(tmp_path), time_to_quality.Task("sweep", 16, {"batch_size": 8}, "")
    for rate, loss in ((1e-4, 1.9), (2e-4, 1.8), (4e-4, 1.8)):
        results.add("sweep: TRL, full", {"learning_rate": rate, "held_out": [[0, 2.0], [2, loss]]})
    time_to_quality.find_rate(results, task, "TRL, full")
    assert time_to_quality.best_rate(results, "TRL, full") == 2e-4


def test_in_turns_fills_conversations_up_to_their_most_tokens(tiny_chat: ChatModel) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    one = time_to_quality.tokens_in(
        time_to_quality.in_turns(rows, 1, 60, tiny_chat.template)[0]["messages"], tiny_chat.template
    )
    first, second = time_to_quality.in_turns(rows, 2, 60, tiny_chat.template)
    turns = len(first["messages"])
    assert turns >= 4
    assert first["messages"][:2] == [
        {"role": "user", "content": "Say 0."},
        {"role": "assistant", "content": "It is 0."},
    ]
    assert second["messages"][0]["content"] == f"Say {turns // 2}."
    longer = [*first["messages"], *second["messages"][:2]]
    assert one <= 60 < time_to_quality.tokens_in(longer, tiny_chat.template)
    with pytest.raises(SystemExit, match="too few rows"):
        time_to_quality.in_turns(rows, 40, 60, tiny_chat.template)


@pytest.mark.usefixtures("contenders")
def test_peers_learn_the_tokens_that_handspun_learns(tiny_chat: ChatModel, tmp_path: Path) -> None:
    from job import Job
    from peers import IGNORED, tokenized

    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(6)]
    conversations = time_to_quality.in_turns(rows, 1, 80, tiny_chat.template)
    for given in (rows[:1], conversations):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(given), encoding="utf-8")
        [theirs] = tokenized(Job(model="", rows=str(file), max_length=1000), tiny_chat.tokenizer)
        [ours], _ = build_examples([Row("rows", 1, dict(given[0]))], tiny_chat.template, max_length=1000)
        assert theirs["input_ids"] == list(ours.input_ids)
        assert [label != IGNORED for label in theirs["labels"]] == list(ours.loss_mask)
