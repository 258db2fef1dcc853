"""The benchmarks' own arithmetic, command lines, and the contender that is Handspun."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import decode
from handspun.models.load import ChatModel
from measurements import Results

ROOT = Path(__file__).parents[1]
CONTENDERS = ROOT / "benchmarks" / "contenders"


def commands_of_decode() -> list[list[str]]:
    """As they stand in the documents and in the script's own head."""
    texts = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    lines = re.findall(r"^ +python benchmarks/decode\.py(.*)$", "\n".join([*texts, decode.__doc__]), re.MULTILINE)
    return [shlex.split(re.sub(r"[\[\]]", "", line)) for line in lines]


@pytest.mark.parametrize("words", commands_of_decode(), ids=" ".join)
def test_documented_command_lines_parse(words: list[str]) -> None:
    assert set(decode.parse(words).only or []) <= set(decode.CONTENDERS)


def test_no_prompt_begins_as_another_does(tiny_chat: ChatModel) -> None:
    """An engine that keeps the prompts it has read is not to find them again."""
    batches = list(decode.prompts_of(decode.Column(8), tiny_chat.template, 3))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len({prompt["text"].split()[0] for batch in batches for prompt in batch}) == 24


def test_prefill_is_of_the_length_that_the_table_names(tiny_chat: ChatModel) -> None:
    [[first], [second]] = decode.prompts_of(decode.Column(1, prefill=True), tiny_chat.template, 2)
    assert len(first["ids"]) == len(second["ids"]) == decode.PREFILLED
    assert first["text"].split()[0] != second["text"].split()[0]


def test_rates_and_ratios_to_the_best_peer(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {"settings": {"new_tokens": 48}})
    seconds = {"transformers": [6.0, 4.0], "OpenVINO GenAI": [2.0], "Handspun": [1.0]}
    for name, values in seconds.items():
        run = {"engine": name, "peak_gb": 1.0, "ids": [1, 2, 3]}
        results.add(decode.key(name, "8 rows"), {**run, "seconds": values})
        results.add(decode.key(name, "prefill"), {**run, "seconds": [value / 10 for value in values]})
    assert decode.figures(results, "transformers", "8 rows") == [64.0, 96.0]  # 8 * 48 tokens
    assert decode.cell(results, "transformers", "8 rows") == "80.0 (64.0-96.0)"
    # 384 and 80 to 192 tokens a second, and 0.1 and 0.5 to 0.2 seconds
    for title in ("8 rows", "prefill"):
        assert decode.ratio(results, "Handspun", title) == "2.00"
        assert decode.ratio(results, "OpenVINO GenAI", title) == "1.00"
    assert decode.ratio(results, "transformers", "8 rows") == "0.42"
    assert decode.ratio(results, "Handspun", "1 row") == ""
    assert "3 of 3" in decode.summary(results)


@pytest.mark.parametrize("beams", [1, 2])
def test_handspun_decodes_the_tokens_that_are_asked_for(
    beams: int,
    tiny_folder: Path,
    tiny_chat: ChatModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the very prompts that the peers get as ids."""
    batches = list(decode.prompts_of(decode.Column(2), tiny_chat.template, 3))
    (tmp_path / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
    job = {
        "model": str(tiny_folder),
        "batches": str(tmp_path / "batches.json"),
        "new_tokens": 4,
        "beams": beams,
        "end_ids": decode.end_ids(tiny_chat.template),
        "options": {"weights": "float32"},
    }
    monkeypatch.syspath_prepend(CONTENDERS)
    monkeypatch.setattr(sys, "argv", ["handspun_decode.py", json.dumps(job)])
    import handspun_decode

    handspun_decode.main()
    run = json.loads(capsys.readouterr().out)
    assert len(run["seconds"]) == 2  # the first batch warms up
    assert len(run["ids"]) == 4
