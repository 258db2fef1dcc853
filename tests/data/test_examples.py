"""Every row is accounted for: kept, truncated, dropped and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import fingerprint, load_splits, resolve_max_length
from handspun.data.examples import (
    DataReport,
    Example,
    RowIssue,
    build_examples,
    check_rows_left,
    concatenate,
    hold_out,
)
from handspun.data.rows import Row
from handspun.errors import ConfigError, DataError
from handspun.preflight.print import account_lines, length_lines
from tiny import tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())


def rows_of(*pairs: tuple[str, str]) -> list[Row]:
    return [Row("rows.csv", i, {"instruction": a, "output": b}) for i, (a, b) in enumerate(pairs, start=1)]


def test_empty_outputs_are_dropped_counted_and_listed() -> None:
    rows = rows_of(("Say hi.", "Hi."), ("Say nothing.", ""), ("Say yes.", "Yes."), ("Blank.", "  \n"))
    examples, account = build_examples(rows, TEMPLATE, max_length=100)
    assert [example.row for example in examples] == [1, 3]
    assert (account.rows, account.kept) == (4, 2)
    ((reason, notes),) = account.dropped_by_reason().items()
    assert "output" in reason
    assert [note.row for note in notes] == [2, 4]
    assert any("(rows 2, 4)" in line for line in account_lines(account, max_length=100))


def test_pandas_missing_words_are_answers_like_any_other() -> None:
    rows = rows_of(("a", "N/A"), ("b", "None"), ("c", "NA"), ("d", "nan"), ("e", "007"))
    examples, account = build_examples(rows, TEMPLATE, max_length=100)
    assert account.kept == 5
    tokenizer = TEMPLATE.tokenizer
    target_ids = [[i for i, on in zip(e.input_ids, e.loss_mask, strict=True) if on] for e in examples]
    assert [tokenizer.decode(ids) for ids in target_ids] == [f"{r.values['output']}<|im_end|>" for r in rows]


def test_truncation_keeps_the_front_and_is_counted() -> None:
    rows = rows_of(("Count.", "one two three four five six seven eight nine ten"), ("Hi.", "Hi."))
    (whole, _), _ = build_examples(rows, TEMPLATE, max_length=1000)
    cut_at = len(whole) - 4
    (cut, _), account = build_examples(rows, TEMPLATE, max_length=cut_at)
    assert cut.input_ids == whole.input_ids[:cut_at]
    assert [(note.row, note.text) for note in account.truncated] == [(1, f"{len(whole)} tokens")]
    assert account.kept == 2


@pytest.mark.parametrize(("left_out", "truncated"), [(0, []), (1, [1])])
def test_a_row_of_just_max_length_is_not_truncated(left_out: int, truncated: list[int]) -> None:
    rows = rows_of(("Count.", "one two three"))
    (whole,), _ = build_examples(rows, TEMPLATE, max_length=1000)
    (made,), account = build_examples(rows, TEMPLATE, max_length=len(whole) - left_out)
    assert len(made) == len(whole) - left_out
    assert [note.row for note in account.truncated] == truncated


def test_a_row_with_no_target_left_is_dropped_with_its_reason() -> None:
    rows = rows_of(("A very long question that fills all the room there is.", "Yes."), ("Hi.", "Hi."))
    examples, account = build_examples(rows, TEMPLATE, max_length=25)
    assert [example.row for example in examples] == [2]
    assert [note.text for note in account.dropped] == ["nothing to train on is left within max_length 25"]
    assert account.kept + len(account.dropped) == account.rows


def test_strict_names_the_rows_that_would_be_lost() -> None:
    with pytest.raises(DataError, match=r"1 rows dropped and 0 truncated") as caught:
        build_examples(rows_of(("a", "b"), ("c", "")), TEMPLATE, max_length=100, strict=True)
    assert "rows.csv, row 2" in str(caught.value)


def test_no_row_left_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match="none of its 2 rows can be trained on"):
        build_examples(rows_of(("a", ""), ("b", "")), TEMPLATE, max_length=100)


def test_no_rows_at_all_are_the_same_error() -> None:
    with pytest.raises(DataError, match="none of its 0 rows can be trained on"):
        build_examples([], TEMPLATE, max_length=100)


def test_rows_keep_their_order_whatever_is_tokenized_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(*[(f"question {i}", "answer" if i % 5 else "") for i in range(50)])
    whole, account = build_examples(rows, TEMPLATE, max_length=30)
    monkeypatch.setattr("handspun.data.examples._ROWS_AT_ONCE", 3)
    parts, same_account = build_examples(rows, TEMPLATE, max_length=30)
    assert [(e.row, e.input_ids, e.loss_mask) for e in parts] == [(e.row, e.input_ids, e.loss_mask) for e in whole]
    assert same_account == account


def test_no_conversation_format_is_taken_from_a_neighboring_file() -> None:
    rows = [*rows_of(("a", "b")), Row("chat.jsonl", 1, {"prompt": "c", "completion": "d", "id": 7})]
    _, account = build_examples(rows, TEMPLATE, max_length=100)
    assert account.formats == {"rows.csv": "alpaca", "chat.jsonl": "prompt-completion"}
    assert account.unused_columns == {"chat.jsonl": ["id"]}


def test_holding_out_is_by_rows_seeded_and_complete() -> None:
    rows = rows_of(*[(f"question {i}", "answer") for i in range(20)])
    kept, held = hold_out(rows, 0.25, seed=1)
    assert (len(kept), len(held)) == (15, 5)
    assert sorted(row.number for row in kept + held) == list(range(1, 21))
    assert hold_out(rows, 0.25, seed=1) == (kept, held)
    assert hold_out(rows, 0.25, seed=2) != (kept, held)
    assert [len(part) for part in hold_out(rows[:2], 0.01, seed=0)] == [1, 1]


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (99, 0), (100, 5), (330, 16), (3990, 200), (9000, 200)])
def test_by_default_a_twentieth_is_held_out_at_most_200_and_none_of_few_rows(rows: int, held_out: int) -> None:
    of = rows_of(*[(f"question {i}", "answer") for i in range(rows)])
    kept, held = hold_out(of, None, seed=0)
    assert (len(kept), len(held)) == (rows - held_out, held_out)
    assert hold_out(of, 0.0, seed=0) == (of, [])


def test_one_row_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="too few to hold some out"):
        hold_out(rows_of(("a", "b")), 0.5, seed=0)


def test_the_fingerprint_is_of_the_values() -> None:
    assert fingerprint(rows_of(("a", "b"))) == fingerprint(
        [Row("other.csv", 9, {"output": "b", "instruction": "a"})]
    )
    assert fingerprint(rows_of(("a", "b"))) != fingerprint(rows_of(("a", "c")))


def test_max_length_is_2048_or_the_models_limit() -> None:
    assert [resolve_max_length(None, limit) for limit in (None, 32768, 512)] == [2048, 2048, 512]
    assert resolve_max_length(100, 512) == 100
    with pytest.raises(ConfigError, match="reads at most 512"):
        resolve_max_length(513, 512)


def test_rows_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("instruction,output\nSay hi.,Hi.\n", encoding="utf-8")
    (tmp_path / "held.jsonl").write_text('{"prompt": "Say yes.", "completion": "Yes."}\n', encoding="utf-8")
    training, held_out = load_splits(
        DataConfig(data=str(tmp_path / "train.csv")),
        TEMPLATE,
        max_length=99,
        eval_data=[str(tmp_path / "held.jsonl")],
    )
    assert held_out is not None
    assert (len(training.examples), len(held_out.examples)) == (1, 1)


def test_examples_begin_with_the_system_prompt_that_is_given(tmp_path: Path) -> None:
    """In training and in held-out rows, and only where the row has none of its own."""
    own = [{"role": "system", "content": "Be long."}]
    turns = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in (turns, [*own, *turns])]
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    config = DataConfig(data=str(tmp_path / "train.jsonl"), system_prompt="Be brief.")
    training, held_out = load_splits(config, TEMPLATE, max_length=99, eval_data=[str(tmp_path / "held.jsonl")])
    assert held_out is not None
    for examples in (training.examples, held_out.examples):
        texts = [TEMPLATE.tokenizer.decode(example.input_ids) for example in examples]
        rest = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>"
        assert texts == [
            "<|im_start|>system\nBe brief.<|im_end|>\n" + rest,
            "<|im_start|>system\nBe long.<|im_end|>\n" + rest,
        ]


def test_lengths_are_told_with_quantiles_and_bars() -> None:
    rows = rows_of(*[("a", "b" * n) for n in range(1, 11)])
    examples, _ = build_examples(rows, TEMPLATE, max_length=1000)
    lines = length_lines(examples)
    lengths = sorted(len(e) for e in examples)
    assert (
        f"least {lengths[0]}  median {lengths[4]}  90 % {lengths[8]}  99 % {lengths[9]}  most {lengths[9]}"
        in lines[0]
    )
    assert sum(int(line.split()[-1]) for line in lines[1:-1]) == 10


def test_concatenate_keeps_the_types_of_its_columns_beside_an_empty_part() -> None:
    dataset = concatenate([[Example([1, 2], [False, True], "a", 1)], []])
    assert (dataset.input_ids.dtype, dataset.loss_mask.dtype) == (np.int32, np.bool_)
    assert [(e.input_ids, e.loss_mask, e.file, e.row) for e in dataset] == [([1, 2], [False, True], "a", 1)]


def test_new_reports_are_empty_and_share_nothing() -> None:
    first, second = DataReport(), DataReport()
    first.formats["a"] = "alpaca"
    assert second.formats == second.unused_columns == second.file_notes == {}
    assert second.dropped == second.truncated == second.notes == []


def test_progress_counts_rows_up_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handspun.data.examples._ROWS_AT_ONCE", 20)
    done: list[int] = []
    build_examples(rows_of(*[("a", "b")] * 50), TEMPLATE, max_length=30, progress=done.append)
    assert done == [20, 40, 50]


def test_tools_of_a_row_reach_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    template, tool = ChatTemplate(tiny_tokenizer()), {"type": "function", "function": {"name": "look_up"}}
    lay_out = template.lay_out
    monkeypatch.setattr(template, "lay_out", lambda messages, tools: seen.append(tools) or lay_out(messages))
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    build_examples([Row("chat.jsonl", 1, {"messages": turns, "tools": [tool]})], template, max_length=100)
    assert [[tool["function"]["name"] for tool in tools] for tools in seen] == [["look_up"]]


def test_keys_of_messages_that_are_ignored_are_unused_columns_of_their_file() -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello.", "id": 7}]
    rows = [*rows_of(("a", "b")), *(Row("chat.jsonl", number, {"messages": turns}) for number in (1, 2))]
    _, account = build_examples(rows, TEMPLATE, max_length=100)
    assert account.unused_columns == {"chat.jsonl": ["id (of messages)"]}


def test_what_is_not_tokenized_is_told_as_more_than_what_is() -> None:
    """No token has a thousand characters, so a hundred thousand cannot fit in 50 tokens."""
    (made,), account = build_examples(rows_of(("Hi.", "abc " * 25_000)), TEMPLATE, max_length=50)
    assert len(made) == 50
    [issue] = account.truncated
    assert (issue.row, issue.text.startswith("more than ")) == (1, True)


@pytest.mark.parametrize(("reasons", "more"), [(1, ""), (20, ""), (21, "; and 1 more reasons")])
def test_check_rows_left_names_twenty_reasons(reasons: int, more: str) -> None:
    dropped = [RowIssue("a.csv", number, f"reason {number}") for number in range(reasons)]
    listed = "; ".join(f"reason {number}: 1" for number in range(min(reasons, 20)))
    with pytest.raises(DataError) as caught:
        check_rows_left(DataReport(rows=reasons, dropped=dropped), strict=False)
    assert f"none of its {reasons} rows can be trained on ({listed}{more}). Run" in str(caught.value)


@pytest.mark.parametrize(("rows", "more"), [(1, ""), (20, ""), (21, "\n  and 1 more")])
def test_check_rows_left_lists_twenty_rows_under_strict(rows: int, more: str) -> None:
    lost = [RowIssue("a.csv", number, "empty") for number in range(rows)]
    listed = "\n".join(f"  a.csv, row {number}: empty" for number in range(min(rows, 20)))
    with pytest.raises(DataError) as caught:
        check_rows_left(DataReport(rows=99, kept=99 - rows, dropped=lost[:1], truncated=lost[1:]), strict=True)
    assert f"does not allow:\n{listed}{more}\nFix the rows" in str(caught.value)
