"""Tokenised examples on the disk, found again by their content and read back memory-mapped.

The key is a hash of everything that they depend on: rows, tokenizer with its template, options, and the code that
makes them. A set is a folder that gets its name once it is whole, and is never changed; the least recently used go
when there are too many.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handspun.data.chat_template import ChatTemplate
from handspun.data.example_arrays import ExampleArrays
from handspun.data.examples import RowAccount, RowNote
from handspun.data.rows import Row
from handspun.files import sha256_of

MOST_BYTES = 4 * 2**30
"""Of all sets together."""

_ARRAYS = ("input_ids", "learned", "starts", "rows", "files")
_FACTS, _CHECKSUMS, _PARTIAL = "facts.json", "sha256.json", ".partial-"
_ABANDONED = 24 * 60 * 60
"""Seconds after which a set that is still not whole belongs to a process that was killed."""


@dataclass(frozen=True)
class ExampleCache:
    """The sets in a folder."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def find(self, key: str) -> tuple[ExampleArrays, RowAccount] | None:
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

    def keep(self, key: str, examples: ExampleArrays, account: RowAccount) -> None:
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


def _write(folder: Path, examples: ExampleArrays, account: RowAccount) -> None:
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(examples, name))
    facts = {"account": asdict(account), "file_names": examples.file_names}
    (folder / _FACTS).write_text(json.dumps(facts), encoding="ascii")
    (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="ascii")


def _read(folder: Path) -> tuple[ExampleArrays, RowAccount]:
    """Raises ValueError if it is not what was written."""
    if json.loads((folder / _CHECKSUMS).read_text(encoding="ascii")) != _checksums(folder):
        raise ValueError(f"{folder} is damaged")
    # A memmap's slices are memmaps too, and slow to make: the plain view of it is what rows are cut from.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
    facts = json.loads((folder / _FACTS).read_text(encoding="ascii"))
    return ExampleArrays(**arrays, file_names=facts["file_names"]), _account(facts["account"])


def _checksums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (*(f"{array}.npy" for array in _ARRAYS), _FACTS)}


def _account(facts: dict[str, Any]) -> RowAccount:
    notes = {name: [RowNote(**note) for note in facts[name]] for name in ("dropped", "truncated", "notes")}
    whole: dict[str, Any] = {**facts, **notes}
    return RowAccount(**whole)
