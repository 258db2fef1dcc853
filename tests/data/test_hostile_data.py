"""Whatever the data is, it becomes examples with every row accounted for, or one clear error: no traceback, no
waiting, no more memory than a multiple of the file."""

import signal
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from handspun.cli import main
from handspun.config import DataConfig
from handspun.config.spelling import in_python
from handspun.data import readers as parquet_files
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset, load_splits
from handspun.data.rows import read_rows
from handspun.data.text_loss import detect_mojibake
from handspun.errors import ConfigError, DataError
from hostile import KINDS, table
from hostile_files import SIZES
from hostile_making import LARGE, Case
from tiny import tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())
CASES = list(chain(*KINDS.values()))
SMALL = [case for case in CASES if case not in SIZES]
MOST_SECONDS = 120  # wherever the tests run, and whatever else does
PAGE = Path(__file__).parents[2] / "docs" / "data_from_anywhere.md"


@pytest.fixture(autouse=True)
def time_limit_and_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {MOST_SECONDS} s")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def prepared(source: str) -> Dataset:
    return load_splits(DataConfig(data=source), TEMPLATE, max_length=1000)[0]


def check(case: Case, source: str) -> None:
    """That it comes to the outcome that the corpus says."""
    if case.error:
        with pytest.raises((DataError, ConfigError)) as caught:
            prepared(source)
        assert str(caught.value).startswith(in_python(case.error))
        assert len(str(caught.value)) < 10_000
        return
    made = prepared(source)
    account = made.account
    assert account.rows == account.kept + len(account.dropped)
    assert account.kept == case.kept
    assert [note.row for note in account.dropped] == list(case.dropped)
    assert [note.row for note in account.notes] == list(case.noted)
    assert [note.row for note in account.truncated] == list(case.truncated)
    for notes, expected in ((account.dropped, case.dropped), (account.notes, case.noted)):
        assert all(note.text.startswith(expected[note.row]) for note in notes)
        assert all(len(note.text) < 1000 for note in notes)
    assert {example.row for example in made.examples} == set(range(1, account.rows + 1)) - set(case.dropped)
    assert all(example.learned_tokens for example in made.examples)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_hostile_data_is_accounted_for_or_one_clear_error(case: Case) -> None:
    check(case, case.make())


@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_large_data_takes_a_multiple_of_its_size(case: Case) -> None:
    source = case.make()
    size = LARGE if source.endswith(".parquet") else min(Path(source).stat().st_size, LARGE)  # that one is packed
    with at_most(16 * size + 200 * 2**20):
        check(case, source)


@contextmanager
def at_most(most_bytes: int) -> Iterator[None]:
    """Asserts that the block adds no more than so much to what this process holds in memory, at any time."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < most_bytes


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_command_line_answers_hostile_data_with_an_exit_code_and_no_trace(
    case: Case, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "--model", str(tiny_folder), "--data", case.make(), "--no-cache-examples"]) == (
        2 if case.error else 0
    )
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert printed.err.startswith("error: ") == bool(case.error)
    assert case.error.replace("\n", "") in printed.err.replace("\n", "")
    assert not {char for char in printed.out if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"}


def test_the_corpus_is_large_and_every_case_has_a_name_of_its_own() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_documentation_says_of_every_case_what_happens() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "columns",
    [
        {"instruction": ["a"] * 100_000, "output": ["b"] * 100_000},
        {"instruction": ["a" * 10_000] * 3000, "output": ["b"] * 3000},
    ],
    ids=["many rows", "a long text many times"],
)
def test_a_parquet_file_that_unpacks_to_more_than_memory_is_refused(
    columns: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table(columns), "train.parquet")
    assert Path("train.parquet").stat().st_size < 10_000
    monkeypatch.setattr(parquet_files, "memory_limit", lambda: 10**7)
    with pytest.raises(
        DataError, match=r"train.parquet: its \d+ rows unpack to more than this machine's 0 GB of memory"
    ):
        read_rows("train.parquet")


def test_no_memory_left_is_an_error_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: Path) -> bytes:
        raise MemoryError

    Path("train.csv").write_text("instruction,output\na,b\n")
    monkeypatch.setattr(Path, "read_bytes", no_memory)
    with pytest.raises(DataError, match=r"train.csv: there is not enough memory to read it"):
        read_rows("train.csv")


_SENTENCES = [
    "Don’t panic — the café’s naïve façade cost £5 (≈ €6).",
    "Größe, Straße, Öl; être à l’œuvre; ¿Qué pasó, señor?",
    "Привет, мир! Γειά σου Κόσμε.",
    "“Ångström” × ½ ± 3 °C § 4 ¶",
]


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "windows-1250", "windows-1251", "mac_roman"])
@pytest.mark.parametrize("sentence", _SENTENCES)
def test_utf8_read_as_another_encoding_is_recognized_and_the_right_text_is_not(
    sentence: str, encoding: str
) -> None:
    assert detect_mojibake([sentence]) == []
    misread = sentence.encode().decode(encoding, errors="replace").replace("\ufffd", "")
    [told] = detect_mojibake([misread])
    assert told.startswith("mojibake")
