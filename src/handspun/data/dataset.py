"""Load the examples of a run: read rows once, hold some out, and tokenize them or find them in the cache."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from handspun.config import DataConfig
from handspun.config.rows_in_memory import RowsInMemory
from handspun.data.chat_template import ChatTemplate
from handspun.data.documents import end_of_text
from handspun.data.examples import (
    DataReport,
    TokenDataset,
    build_examples,
    check_formats,
    check_rows_left,
    hold_out,
)
from handspun.data.formats import TEXT
from handspun.data.rows import FileNotes, Row, read_sources
from handspun.display import count_of, logger, printable
from handspun.errors import ConfigError
from handspun.files import from_json, sha256_of

MOST_BYTES = 4 * 2**30
"""Size limit of the whole cache."""

_ARRAYS = ("input_ids", "loss_mask", "starts", "rows", "files")
_FACTS, _CHECKSUMS, _PARTIAL = "facts.json", "sha256.json", ".partial-"
_ABANDONED = 24 * 60 * 60
"""Seconds after which an incomplete entry is taken to belong to a process that was killed."""


@dataclass(frozen=True)
class ExampleCache:
    """A folder of tokenized data sets, looked up by a hash of their content.

    An entry is renamed into place when it is complete, and its checksums are compared when it is read.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def find(self, key: str) -> tuple[TokenDataset, DataReport] | None:
        """Return the entry of a key, or None. A damaged entry is deleted."""
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            found = _read(entry)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with suppress(OSError):  # another user's entry, or a read-only disk
            os.utime(entry)  # the least recently used entries are evicted first
        return found

    def keep(self, key: str, examples: TokenDataset, account: DataReport) -> None:
        """Write an entry. If several processes write the same one, the first one's stays. Raises OSError."""
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
        """Delete the least recently used entries beyond the size limit, and abandoned partial ones."""
        # Another process may evict at the same time. A process that reads an entry keeps what it has mapped.
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                size = sum(file.stat().st_size for file in path.iterdir())
                used.append((path.stat().st_mtime, size, path))
        total = 0
        for last, size, path in sorted(used, key=lambda entry: (entry[2] == but, entry[0]), reverse=True):
            if path.name.startswith(_PARTIAL):
                is_unneeded = time.time() - last > _ABANDONED
            else:
                total += size
                is_unneeded = total > self.most_bytes and path != but
            if is_unneeded:
                shutil.rmtree(path, ignore_errors=True)


def key_of(rows: Sequence[Row], template: ChatTemplate, options: dict[str, Any]) -> str | None:
    """Return a hash of everything that the examples depend on, or None if the template asks for the time.

    options: the options of `build_examples` that change the examples.
    """
    # The hash covers the content, this folder's code included, so no change needs a cache to be deleted by hand.
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
    """Read an entry. Raises ValueError if its checksums differ."""
    if json.loads((folder / _CHECKSUMS).read_text(encoding="ascii")) != _checksums(folder):
        raise ValueError(f"{folder} is damaged")
    # Slices of a memmap are memmaps too, and slow to create, so rows are cut from a plain view.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
    facts = json.loads((folder / _FACTS).read_text(encoding="ascii"))
    return TokenDataset(**arrays, file_names=facts["file_names"]), from_json(DataReport, facts["account"])


def _checksums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (*(f"{array}.npy" for array in _ARRAYS), _FACTS)}


DEFAULT_MAX_LENGTH = 2048

_LARGE = 50_000_000
"""Size in bytes from which reading a file is logged."""
_SECONDS_BETWEEN_LINES = 10.0
"""Seconds between two progress lines."""
_MOST_ACCOUNTED = 200
"""Rows of each kind (dropped, truncated, noted) that stay in memory after the others are released."""


@dataclass(frozen=True)
class Dataset:
    """Examples, a report on their rows, a sha256 of these rows, and the raw rows that the report names."""

    examples: TokenDataset
    account: DataReport
    fingerprint: str
    accounted: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list, repr=False)
    """All rows, for the checks before the run. `release_rows` frees them."""

    def release_rows(self, keep: Collection[tuple[str, int]] = ()) -> None:
        """Free all rows except those to keep, as (file, row number), and those that the report names."""
        self.rows[:] = [row for row in self.rows if (row.file, row.number) in keep]


def check_small_files(config: DataConfig, sources: Sequence[str]) -> None:
    """Raise DataError for files that cannot be read or fit no format: an answer now, not after a model's download.

    They are read again afterwards. Large files, folders, and hub datasets are read once, and not here.
    """
    for source in sources:
        if not isinstance(source, RowsInMemory) and _is_small_file(source):
            rows = read_sources([source], columns=config.column_names, limit=config.limit)
            check_formats(rows, config.data_format)


def _is_small_file(source: str) -> bool:
    path = os.path.expanduser(source)
    try:
        return os.path.isfile(path) and os.stat(path).st_size <= _LARGE
    except (OSError, ValueError):  # reading raises the proper error
        return False


def load_splits(
    config: DataConfig,
    template: ChatTemplate,
    *,
    max_length: int,
    eval_data: Sequence[str] = (),
    eval_ratio: float | None = 0.0,
    seed: int = 0,
    cache: ExampleCache | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Return (training examples, held-out examples or None). Raises DataError.

    Args:
        config: which rows to read, and how to tokenize them.
        template: the model's chat template.
        max_length: most tokens per example.
        eval_data: where held-out rows come from, if not from the training rows.
        eval_ratio: share of the training rows to hold out, or None for the default of `hold_out`.
        seed: decides which rows are held out.
        cache: where to look for examples, and to keep them.
    """
    notes: FileNotes = {}
    held_out_notes: FileNotes = {}
    for source in (*config.sources, *eval_data):
        _log_if_large(source)
    rows, held_out = read_split(
        config,
        eval_data=eval_data,
        eval_ratio=eval_ratio,
        seed=seed,
        notes=notes,
        held_out_notes=held_out_notes,
    )

    def set_of(some: Sequence[Row], file_notes: FileNotes) -> Dataset:
        return example_set(some, config, template, max_length=max_length, file_notes=file_notes, cache=cache)

    return set_of(rows, notes), set_of(held_out, held_out_notes) if held_out else None


def example_set(
    rows: Sequence[Row],
    config: DataConfig,
    template: ChatTemplate,
    *,
    max_length: int,
    file_notes: FileNotes,
    cache: ExampleCache | None = None,
) -> Dataset:
    """Return the examples of rows, with a report. Raises DataError.

    Args:
        rows: as `read_rows` returns them.
        config: how to read and tokenize them.
        template: the model's chat template.
        max_length: most tokens per example.
        file_notes: the notes of `read_rows`, for the report.
        cache: where to look for examples, and to keep them.
    """
    options = {
        "max_length": max_length,
        "data_format": config.data_format,
        "system_prompt": config.system_prompt,
        "role_map": config.roles,
    }
    used = cache if config.cache_examples else None
    examples, account, how = _examples(rows, template, options, config.strict, used)
    account.file_notes = file_notes
    for file in (file for file, data_format in account.formats.items() if data_format == TEXT):
        note = f"plain text: every token is trained on, and {end_of_text(template)[1]} ends each row"
        file_notes.setdefault(file, []).append(note)
    logger.info(how)
    return Dataset(examples, account, fingerprint(rows), _flagged_rows(rows, account), list(rows))


def _log_if_large(source: str) -> None:
    """Log that a large file is read, which takes a while without any other log line."""
    with suppress(OSError, ValueError):  # read_rows raises the proper error
        size = os.stat(os.path.expanduser(source)).st_size
        if size > _LARGE:
            logger.info(f"reading {printable(source)} ({size / 1e6:.0f} MB)")


def read_split(
    config: DataConfig,
    *,
    eval_data: Sequence[str],
    eval_ratio: float | None,
    seed: int,
    notes: FileNotes | None = None,
    held_out_notes: FileNotes | None = None,
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return (training rows, held-out rows). The same files give the same rows.

    Args:
        config: which rows to read.
        eval_data: where held-out rows come from, if not from the training rows.
        eval_ratio: share of the training rows to hold out, or None for the default of `hold_out`.
        seed: decides which rows are held out.
        notes: filled with what was skipped in the files of `config.data`; see `read_rows`.
        held_out_notes: the same for `eval_data`.
    """
    rows = read_sources(config.sources, notes, config.column_names, config.limit)
    if eval_data:
        return rows, read_sources(eval_data, held_out_notes, config.column_names)
    return hold_out(rows, eval_ratio, seed)


def _examples(
    rows: Sequence[Row],
    template: ChatTemplate,
    options: dict[str, Any],
    strict: bool,
    cache: ExampleCache | None,
) -> tuple[TokenDataset, DataReport, str]:
    """Return examples from the cache, or build and cache them. Also return a log line that says which."""
    started = time.perf_counter()
    key = key_of(rows, template, options) if cache else None
    found = cache.find(key) if cache and key else None
    if found is not None:
        check_rows_left(found[1], strict=strict)
        seconds = time.perf_counter() - started
        return *found, f"{count_of(len(rows), 'tokenized row')} loaded from the cache in {seconds:.1f} s"
    examples, account = build_examples(rows, template, strict=strict, progress=_Progress(len(rows)), **options)
    seconds = time.perf_counter() - started
    if cache and key:
        kept = _keep(cache, key, examples, account)
    else:
        kept = "not cached, because the template writes the time" if cache else "not cached"
    return examples, account, f"{count_of(len(rows), 'row')} tokenized in {seconds:.1f} s; {kept}"


@dataclass
class _Progress:
    """Logs now and then how many rows are tokenized."""

    rows: int
    last: float = field(default_factory=time.perf_counter)

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if done < self.rows and now - self.last > _SECONDS_BETWEEN_LINES:
            self.last = now
            logger.info(f"{done:,} of {self.rows:,} rows tokenized")


def _flagged_rows(rows: Sequence[Row], account: DataReport) -> list[Row]:
    """Return the first 200 rows of each kind: dropped, truncated and noted."""
    kinds = (account.dropped, account.truncated, account.notes)
    named = {(note.file, note.row) for notes in kinds for note in notes[:_MOST_ACCOUNTED]}
    return [row for row in rows if (row.file, row.number) in named]


def _keep(cache: ExampleCache, key: str, examples: TokenDataset, account: DataReport) -> str:
    """Cache the examples, and return the outcome for the log. A write error does not end the run."""
    try:
        cache.keep(key, examples, account)
    except OSError as error:
        reason = error.strerror or error
        return f"not cached: cannot write to {cache.folder} ({reason}). Set XDG_CACHE_HOME to use another folder"
    return f"cached in {cache.folder}"


def resolve_max_length(given: int | None, limit: int | None) -> int:
    """Return the user's `max_length`, or by default 2,048 or the model's limit, whichever is less.

    Raises ConfigError if the user's value is more than the model's limit.
    """
    if given is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and given > limit:
        raise ConfigError(
            f"--max-length is {given}, but the model reads at most {limit} tokens. Use a lower value."
        )
    return given


def fingerprint(rows: Sequence[Row]) -> str:
    """Return a sha256 of the rows' values in order, whatever files they come from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str).encode(
                "utf-8", "surrogatepass"
            )
        )
        digest.update(b"\n")
    return digest.hexdigest()
