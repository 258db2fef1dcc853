"""Examples from the cache are those that would be made; whatever changes them, changes the key."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.config import DataConfig
from handspun.data import dataset as prepare
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset, ExampleCache, key_of, load_splits
from handspun.data.examples import (
    Example,
    TokenDataset,
    build_examples,
    concatenate,
    learned_tokens_of,
    lengths_of,
)
from handspun.data.rows import Row
from handspun.display import log_lines_to
from handspun.errors import DataError
from tiny import tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())
OPTIONS: dict[str, Any] = {"max_length": 40, "data_format": "auto", "system_prompt": None}
ROWS = [
    Row("rows.csv", 1, {"instruction": "Say hi.", "output": "Hi, é 你好.", "id": 7}),
    Row("rows.csv", 2, {"instruction": "Say nothing.", "output": ""}),
    Row("more.csv", 1, {"instruction": "Count.", "output": "one two three four five six seven eight nine ten"}),
]


def lists(examples: Any) -> list[tuple[list[int], list[bool], str, int]]:
    return [(e.input_ids, e.loss_mask, e.file, e.row) for e in examples]


def kept(folder: Path, key: str = "key", **options: Any) -> ExampleCache:
    """A cache with the examples of the rows in it."""
    cache = ExampleCache(folder, **options)
    cache.keep(key, *build_examples(ROWS, TEMPLATE, max_length=40))
    return cache


def test_what_comes_back_is_what_was_kept_with_its_account(tmp_path: Path) -> None:
    examples, account = build_examples(ROWS, TEMPLATE, max_length=40)
    assert (len(account.dropped), len(account.truncated), len(account.unused_columns)) == (1, 1, 1)
    found = kept(tmp_path).find("key")
    assert found is not None
    assert lists(found[0]) == lists(examples)
    assert found[1] == account
    assert not found[0].input_ids.flags.writeable
    assert not found[0].input_ids.flags.owndata


_EXAMPLES = st.lists(
    st.builds(
        lambda ids, file, row: Example([id for id, _ in ids], [learned for _, learned in ids], file, row),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=5),
        st.sampled_from(["a.csv", "b.csv"]),
        st.integers(1, 2**40),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(st.lists(_EXAMPLES, min_size=1, max_size=3))
def test_arrays_are_the_list_that_they_are_made_of(parts: list[list[Example]]) -> None:
    whole = [example for part in parts for example in part]
    arrays = concatenate(parts)
    assert lists(arrays) == lists(whole)
    assert lists(arrays[1:]) == lists(whole[1:])
    assert lists([arrays[-1]]) == lists([whole[-1]])
    assert lengths_of(arrays).tolist() == lengths_of(whole).tolist() == [len(example) for example in whole]
    assert learned_tokens_of(arrays) == learned_tokens_of(whole)
    with pytest.raises(IndexError):
        arrays[len(whole)]


def _truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncated, _changed, Path.unlink])
@pytest.mark.parametrize("name", ["input_ids.npy", "loss_mask.npy", "starts.npy", "facts.json", "sha256.json"])
def test_a_damaged_set_is_not_read_and_can_be_made_anew(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    kept(tmp_path)
    damage(tmp_path / "key" / name)
    assert ExampleCache(tmp_path).find("key") is None
    assert kept(tmp_path).find("key") is not None


def _another_tokenizer(**changes: Any) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return ChatTemplate(tokenizer)


def _another_added_token() -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return ChatTemplate(tokenizer)


def _another_normalizer() -> ChatTemplate:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return ChatTemplate(tokenizer)


def test_whatever_examples_depend_on_is_in_the_key() -> None:
    tools = [{"name": "f", "parameters": {"a": 1, "b": 2}}, {"name": "f", "parameters": {"b": 2, "a": 1}}]
    row = ROWS[0]
    keys = [
        key_of(ROWS, TEMPLATE, OPTIONS),
        key_of(ROWS[:2], TEMPLATE, OPTIONS),
        key_of([*ROWS[1:], row], TEMPLATE, OPTIONS),
        key_of([Row("other.csv", 1, row.values), *ROWS[1:]], TEMPLATE, OPTIONS),
        key_of([Row("rows.csv", 9, row.values), *ROWS[1:]], TEMPLATE, OPTIONS),
        key_of([Row("rows.csv", 1, {**row.values, "id": "7"}), *ROWS[1:]], TEMPLATE, OPTIONS),
        *(key_of([Row("rows.csv", 1, {**row.values, "tools": tool})], TEMPLATE, OPTIONS) for tool in tools),
        *(
            key_of(ROWS, TEMPLATE, {**OPTIONS, **change})
            for change in ({"max_length": 41}, {"data_format": "alpaca"}, {"system_prompt": ""})
        ),
        key_of(ROWS, _another_tokenizer(chat_template=f"{TEMPLATE.tokenizer.chat_template}\n"), OPTIONS),
        key_of(ROWS, _another_tokenizer(bos_token="<|endoftext|>"), OPTIONS),
        key_of(ROWS, _another_added_token(), OPTIONS),
        key_of(ROWS, _another_normalizer(), OPTIONS),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key_of(list(ROWS), ChatTemplate(tiny_tokenizer()), dict(OPTIONS)) == keys[0]


def test_a_template_that_writes_the_date_is_not_cached() -> None:
    dated = "{% if false %}{{ strftime_now('%d') }}{% endif %}" + str(TEMPLATE.tokenizer.chat_template)
    assert key_of(ROWS, _another_tokenizer(chat_template=dated), OPTIONS) is None


def test_the_least_recently_used_go_and_the_newest_stays_however_large(tmp_path: Path) -> None:
    kept(tmp_path, "first")
    size = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    kept(tmp_path, "second")
    for age, key in ((300, "first"), (200, "second")):
        os.utime(tmp_path / key, (1e9 - age, 1e9 - age))
    found = ExampleCache(tmp_path).find("first")  # it is used now
    kept(tmp_path, "third", most_bytes=2 * size)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "third"}
    kept(tmp_path, "fourth", most_bytes=1)
    assert {path.name for path in tmp_path.iterdir()} == {"fourth"}
    assert found is not None
    assert lists(found[0]) == lists(build_examples(ROWS, TEMPLATE, max_length=40)[0])  # mapped, though it is gone


def test_what_a_killed_process_left_goes_and_what_another_is_writing_stays(tmp_path: Path) -> None:
    for name in (".partial-old", ".partial-new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".partial-old", (1e9, 1e9))
    kept(tmp_path, most_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {".partial-new", "key"}


def _keep_often(folder: str) -> None:
    for _ in range(20):
        cache = kept(Path(folder), most_bytes=1)
        found = cache.find("key")
        if found is not None:
            assert len(found[0]) == 2


@pytest.mark.slow
def test_two_processes_may_write_and_read_one_set_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_keep_often, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"key"}


def prepared(folder: Path, log: list[str], **options: Any) -> Dataset:
    """The rows of a file through the cache in the folder."""
    file = folder / "rows.jsonl"
    if not file.exists():
        file.write_text("\n".join(json.dumps(row.values) for row in ROWS), encoding="utf-8")
    config = DataConfig(data=str(file), **options)
    cache = ExampleCache(folder / "cache")
    with log_lines_to(log.append):
        return load_splits(config, TEMPLATE, max_length=40, cache=cache)[0]


def test_the_second_run_tokenizes_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    first = prepared(tmp_path, log)
    monkeypatch.setattr(prepare, "build_examples", None)
    second = prepared(tmp_path, log)
    assert lists(second.examples) == lists(first.examples)
    assert (second.account, second.fingerprint) == (first.account, first.fingerprint)
    assert "3 rows tokenized in" in log[0]
    assert f"cached in {tmp_path / 'cache'}" in log[0]
    assert "from the cache" in log[1]
    with pytest.raises(DataError, match="--strict"):
        prepared(tmp_path, log, strict=True)


def test_without_the_cache_nothing_is_written(tmp_path: Path) -> None:
    log: list[str] = []
    prepared(tmp_path, log, cache_examples=False)
    assert not (tmp_path / "cache").exists()
    assert log[0].endswith("not cached")


def test_a_disk_that_cannot_take_them_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    log: list[str] = []
    monkeypatch.setattr(np, "save", full)
    assert len(prepared(tmp_path, log).examples) == 2
    assert "(No space left on device). Set XDG" in log[0]
    assert list((tmp_path / "cache").iterdir()) == []
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file is in the way")
    assert len(prepared(tmp_path, log).examples) == 2
    assert "not cached: cannot write to" in log[1]


def test_arrays_hold_what_the_model_reads() -> None:
    arrays = concatenate([[Example([5, 6, 7], [False, True, True], "a", 1)], [Example([8], [False], "b", 2)]])
    assert isinstance(arrays, TokenDataset)
    assert arrays.input_ids.tolist() == [5, 6, 7, 8]
    assert arrays.loss_mask.tolist() == [False, True, True, False]
    assert arrays.starts.tolist() == [0, 3, 4]
    assert (arrays.rows.tolist(), arrays.files.tolist(), arrays.file_names) == ([1, 2], [0, 1], ["a", "b"])
