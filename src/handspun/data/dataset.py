"""The examples of a run: rows read once, held out, tokenized or found in the cache."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import DataReport, RowIssue, TokenDataset, build_examples, check_rows_left, hold_out
from handspun.data.rows import FileNotes, Row, read_rows
from handspun.display import printable
from handspun.errors import ConfigError
from handspun.files import sha256_of

MOST_BYTES = 4 * 2**30
"""Of all sets together."""

_ARRAYS = ("input_ids", "loss_mask", "starts", "rows", "files")
_FACTS, _CHECKSUMS, _PARTIAL = "facts.json", "sha256.json", ".partial-"
_ABANDONED = 24 * 60 * 60
"""Seconds after which a set that is still not whole belongs to a process that was killed."""


@dataclass(frozen=True)
class ExampleCache:
    """The sets in a folder."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def find(self, key: str) -> tuple[TokenDataset, DataReport] | None:
        """The set of a key with its account; None if there is none. One that was damaged is removed."""
        place = self.folder / key
        if not place.is_dir():
            return None
        try:
            found = _read(place)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            shutil.rmtree(place, ignore_errors=True)
            return None
        with suppress(OSError):  # of someone else, or on a disk that is read only
            os.utime(place)  # the least recently used go first
        return found

    def keep(self, key: str, examples: TokenDataset, account: DataReport) -> None:
        """Writes a set. Of several processes that write it at once, the first one's stays. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
        try:
            _write(partial, examples, account)
            try:
                partial.rename(self.folder / key)
            except OSError:
                if not (self.folder / key).is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._evict(but=self.folder / key)

    def _evict(self, *, but: Path) -> None:
        """Another process may evict at the same time, and one that reads a set keeps what it has mapped."""
        used: list[tuple[float, int, Path]] = []
        for place in self.folder.iterdir():
            with suppress(OSError):
                size = sum(file.stat().st_size for file in place.iterdir())
                used.append((place.stat().st_mtime, size, place))
        total = 0
        for last, size, place in sorted(used, key=lambda entry: (entry[2] == but, entry[0]), reverse=True):
            if place.name.startswith(_PARTIAL):
                is_needless = time.time() - last > _ABANDONED
            else:
                total += size
                is_needless = total > self.most_bytes and place != but
            if is_needless:
                shutil.rmtree(place, ignore_errors=True)


def key_of(rows: Sequence[Row], template: ChatTemplate, options: dict[str, Any]) -> str | None:
    """A hash of all that examples depend on. options: those of `build_examples` that change them.

    None where the template asks for the time: what it writes then is no function of the rest.
    """
    tokenizer = template.tokenizer
    chat_template = json.dumps(tokenizer.chat_template, sort_keys=True)
    if "strftime_now" in chat_template:
        return None
    digest = hashlib.sha256()
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    parts = [
        *(importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")),
        tokenizer.backend_tokenizer.to_str(),
        chat_template,
        json.dumps(template.template_args, sort_keys=True),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(sorted(options.items())),
        *(repr((row.file, row.number, row.values)) for row in rows),  # repr: types and the order of keys count
    ]
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def _write(folder: Path, examples: TokenDataset, account: DataReport) -> None:
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(examples, name))
    facts = {"account": asdict(account), "file_names": examples.file_names}
    (folder / _FACTS).write_text(json.dumps(facts), encoding="ascii")
    (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="ascii")


def _read(folder: Path) -> tuple[TokenDataset, DataReport]:
    """Raises ValueError if it is not what was written."""
    if json.loads((folder / _CHECKSUMS).read_text(encoding="ascii")) != _checksums(folder):
        raise ValueError(f"{folder} is damaged")
    # A memmap's slices are memmaps too, and slow to make: the plain view of it is what rows are cut from.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
    facts = json.loads((folder / _FACTS).read_text(encoding="ascii"))
    return TokenDataset(**arrays, file_names=facts["file_names"]), _account(facts["account"])


def _checksums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (*(f"{array}.npy" for array in _ARRAYS), _FACTS)}


def _account(facts: dict[str, Any]) -> DataReport:
    notes = {name: [RowIssue(**note) for note in facts[name]] for name in ("dropped", "truncated", "notes")}
    whole: dict[str, Any] = {**facts, **notes}
    return DataReport(**whole)


DEFAULT_MAX_LENGTH = 2048

_LARGE = 50_000_000
"""Bytes of a file, of which it is said that it is read."""
_SECONDS_BETWEEN_LINES = 10.0
"""Of progress."""
_MOST_ACCOUNTED = 200
"""Rows of each kind, dropped, truncated or noted, that are held after the others have been let go."""


@dataclass(frozen=True)
class Dataset:
    """Examples, the account of the rows that they came from, a sha256 of those rows, and the rows that the account
    names, as they stand."""

    examples: TokenDataset
    account: DataReport
    fingerprint: str
    accounted: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list, repr=False)
    """All rows, for what looks at them before the run; `release_rows` lets their memory go."""

    def release_rows(self) -> None:
        """Forget all rows but those that the account names."""
        self.rows.clear()


def load_splits(
    config: DataConfig,
    template: ChatTemplate,
    *,
    max_length: int,
    eval_data: str | None = None,
    eval_ratio: float = 0.0,
    seed: int = 0,
    cache: ExampleCache | None = None,
    notice: Callable[[str], None] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """(training examples, held-out examples or None).

    Held-out rows come from `eval_data`, or are an `eval_ratio` of the training rows. `notice` is told whether
    examples were tokenized or found in the cache, and in what time. Raises DataError.
    """
    notes: FileNotes = {}
    held_out_notes: FileNotes = {}
    if notice is not None:
        for source in filter(None, (config.data, eval_data)):
            _say_if_large(source, notice)
    rows, held_out = read_split(
        config.data,
        eval_data=eval_data,
        eval_ratio=eval_ratio,
        seed=seed,
        notes=notes,
        held_out_notes=held_out_notes,
    )

    def set_of(some: Sequence[Row], file_notes: FileNotes) -> Dataset:
        return example_set(
            some, config, template, max_length=max_length, file_notes=file_notes, cache=cache, notice=notice
        )

    return set_of(rows, notes), set_of(held_out, held_out_notes) if held_out else None


def example_set(
    rows: Sequence[Row],
    config: DataConfig,
    template: ChatTemplate,
    *,
    max_length: int,
    file_notes: FileNotes,
    cache: ExampleCache | None = None,
    notice: Callable[[str], None] | None = None,
) -> Dataset:
    """Return the examples of rows that were read, with their account. Raise DataError.

    Args:
        rows: as `read_rows` gives them.
        config: how they are read and tokenized.
        template: the model's.
        max_length: most tokens of an example.
        file_notes: what `read_rows` has noted, for the account.
        cache: where examples are looked for, and kept.
        notice: is told how far tokenizing has come, whether the examples were in the cache, and in what time.
    """
    options = {
        "max_length": max_length,
        "data_format": config.data_format,
        "system_prompt": config.system_prompt,
        "role_map": config.roles,
    }
    used = cache if config.cache_examples else None
    examples, account, how = _examples(rows, template, options, config.strict, used, notice)
    account.file_notes = file_notes
    if notice is not None:
        notice(how)
    return Dataset(examples, account, fingerprint(rows), _flagged_rows(rows, account), list(rows))


def _say_if_large(source: str, notice: Callable[[str], None]) -> None:
    """Reading so much takes a while in which nothing else is said."""
    with suppress(OSError, ValueError):  # read_rows says it
        size = os.stat(os.path.expanduser(source)).st_size
        if size > _LARGE:
            notice(f"reading {printable(source)} ({size / 1e6:.0f} MB)")


def read_split(
    data: str,
    *,
    eval_data: str | None,
    eval_ratio: float,
    seed: int,
    notes: FileNotes | None = None,
    held_out_notes: FileNotes | None = None,
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training rows, held-out rows): the same ones whenever it is asked, as long as the files are the same.

    notes, held_out_notes: are told of what was skipped in files of `data` and of `eval_data`, see `read_rows`.
    """
    rows = read_rows(data, notes)
    if eval_data is not None:
        return rows, read_rows(eval_data, held_out_notes)
    return hold_out(rows, eval_ratio, seed) if eval_ratio > 0 else (rows, [])


def _examples(
    rows: Sequence[Row],
    template: ChatTemplate,
    options: dict[str, Any],
    strict: bool,
    cache: ExampleCache | None,
    notice: Callable[[str], None] | None,
) -> tuple[TokenDataset, DataReport, str]:
    """Those of the cache, or made and kept there; and how they were come by, for the log."""
    started = time.perf_counter()
    key = key_of(rows, template, options) if cache else None
    found = cache.find(key) if cache and key else None
    if found is not None:
        check_rows_left(found[1], strict=strict)
        how = f"{len(rows)} rows, tokenized before: from the cache in {time.perf_counter() - started:.1f} s"
        return *found, how
    progress = _Progress(notice, len(rows)) if notice is not None else None
    examples, account = build_examples(rows, template, strict=strict, progress=progress, **options)
    seconds = time.perf_counter() - started
    if cache and key:
        kept = _keep(cache, key, examples, account)
    else:
        kept = "the template writes the time, so they are not cached" if cache else "not cached"
    return examples, account, f"{len(rows)} rows tokenized in {seconds:.1f} s; {kept}"


@dataclass
class _Progress:
    """Says how far tokenizing has come, every now and then."""

    notice: Callable[[str], None]
    rows: int
    last: float = field(default_factory=time.perf_counter)

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if done < self.rows and now - self.last > _SECONDS_BETWEEN_LINES:
            self.last = now
            self.notice(f"{done} of {self.rows} rows tokenized")


def _flagged_rows(rows: Sequence[Row], account: DataReport) -> list[Row]:
    """The rows that were dropped, truncated or noted; of each of these the first 200."""
    kinds = (account.dropped, account.truncated, account.notes)
    named = {(note.file, note.row) for notes in kinds for note in notes[:_MOST_ACCOUNTED]}
    return [row for row in rows if (row.file, row.number) in named]


def _keep(cache: ExampleCache, key: str, examples: TokenDataset, account: DataReport) -> str:
    """What came of it, for the log. A disk that cannot take them does not end a run."""
    try:
        cache.keep(key, examples, account)
    except OSError as error:
        reason = error.strerror or error
        return f"not cached: {cache.folder} cannot take them ({reason}). XDG_CACHE_HOME names another folder"
    return f"cached in {cache.folder}"


def resolve_max_length(given: int | None, limit: int | None) -> int:
    """The user's `max_length`, or 2,048 or the model's own limit where that is less.

    Raises ConfigError if the user's is more than the model can read.
    """
    if given is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and given > limit:
        raise ConfigError(f"--max-length is {given}, but the model reads at most {limit} tokens: give less.")
    return given


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows' values in their order, whatever files they stand in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str).encode(
                "utf-8", "surrogatepass"
            )
        )
        digest.update(b"\n")
    return digest.hexdigest()
