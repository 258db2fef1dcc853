"""The commands eval and compare, as a person and a machine meet them."""

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from commands import fail
from handspun.cli import main
from handspun.config import GenerationOptions
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.evaluation.compare import Comparison, compare
from handspun.models.load import ChatModel
from handspun.report.compare import comparison_html
from tiny import tiny_model, tiny_tokenizer

ROWS = "instruction,input,output\nSay hi.,,Hi.\nSay nothing.,,\nSay yes.,,Yes.\n"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held_out.csv"
    file.write_text(ROWS)
    return file


def test_eval_shows_a_table_or_json_and_writes_rows(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, held_out: Path
) -> None:
    per_row = held_out.with_name("new") / "rows.jsonl"
    command = ["eval", "--model", str(tiny_folder), "--data", str(held_out)]
    assert main([*command, "--per-row", str(per_row)]) == 0
    printed = capsys.readouterr().out
    assert "rows: 3 read, 2 kept, 1 dropped" in printed
    assert re.search(r"loss +\d\.\d{4} +mean over \d+ target tokens in 2 rows", printed)
    records = [json.loads(line) for line in per_row.read_text().splitlines()]
    assert [(record["row"], record["prompt"], record["expected"]) for record in records] == [
        (1, "Say hi.", "Hi."),
        (3, "Say yes.", "Yes."),
    ]
    assert main([*command, "--json", "--generate", "--max-new-tokens", "2"]) == 0
    scores = json.loads(capsys.readouterr().out)
    tokens = sum(record["tokens"] for record in records)
    mean = sum(record["loss"] * record["tokens"] for record in records) / tokens
    assert scores["learned_tokens"] == tokens
    assert scores["loss"] == pytest.approx(mean, rel=1e-6)
    assert scores["exact_match"]["compared"] == scores["answers"] == 2
    assert scores["rows"]["kept"] == 2


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], held_out: Path
) -> None:
    """The model is not looked for."""
    options = ["--model", "no/model", "--data", str(held_out), "--per-row", str(held_out / "rows.jsonl")]
    assert "--per-row" in fail(capsys, "eval", *options)


def test_eval_names_data_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, held_out: Path
) -> None:
    wrong = str(held_out.with_name("heldout.csv"))
    assert "held_out.csv" in fail(capsys, "eval", "--model", str(tiny_folder), "--data", wrong)
    assert "--batch-size is 0" in fail(
        capsys, "eval", "--model", str(tiny_folder), "--data", str(held_out), "--batch-size", "0"
    )


@pytest.mark.slow
def test_compare_lays_answers_side_by_side(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "prompts.txt").write_text("Say hi.\nTell me a joke about computers.\n")
    page = tmp_path / "compare.html"
    command = ["compare", str(tiny_folder), str(tiny_folder), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--max-new-tokens", "30", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "> Say hi.\n" in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert page.read_text(encoding="utf-8").count('class="answer"') == 4


@pytest.mark.slow
def test_memory_holds_one_model_at_a_time() -> None:
    alive: list[weakref.ref[ChatModel]] = []

    def load(name: str) -> ChatModel:
        gc.collect()
        assert [ref() for ref in alive if ref() is not None] == []
        chat = ChatModel(tiny_model("qwen2", seed=len(alive)), tiny_tokenizer(), name)
        alive.append(weakref.ref(chat))
        return chat

    options = GenerationOptions(max_new_tokens=3)
    found = compare(["a", "b"], ["Hi", "Yes"], load=load, options=options)
    assert [[len(results) for results in answers] for answers in found.answers] == [[1, 1], [1, 1]]
    assert len(alive) == 2


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"system_prompt": "Be brief."}, {"chat": False}], ids=str)
def test_compared_models_are_asked_as_generate_asks_them(given: dict[str, Any]) -> None:
    model = ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "a")
    options = GenerationOptions(max_new_tokens=3, num_beams=2, num_return_sequences=2)
    found = compare(["a"], ["Hi", "Yes"], load=lambda _: model, options=options, **given)
    expected = generate(model, ["Hi", "Yes"], options=options, **given)
    assert found.answers == [[expected[:2], expected[2:]]]


def result(text: str) -> GenerationResult:
    return GenerationResult(text=text, token_ids=[1, 2], prompt_token_ids=[], finish_reason="length")


def test_the_page_escapes_and_needs_nothing_else() -> None:
    hostile = '<script>alert(1)</script> & "quotes"'
    found = Comparison(
        ["models/a<b", "models/c"], [hostile, "Hi"], [[[result(hostile)], [result("x")]], [[result("y")]] * 2]
    )
    page = comparison_html(found, GenerationOptions(do_sample=True, stop_strings=("<b>",)))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in page
    assert "a&lt;b" in page
    assert "do_sample True" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]", page)
    assert not re.findall(r"https?://", page)


def test_the_page_says_where_the_models_agree() -> None:
    found = Comparison(["a", "b"], ["1", "2"], [[[result("x")], [result("x")]], [[result("x")], [result("y")]]])
    assert comparison_html(found, GenerationOptions()).count("Identical answers.") == 1
