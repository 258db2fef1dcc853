"""Checksums of a model's files. A resumed run compares them, since a name may refer to other files by then."""

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from handspun.files import read_json_object, sha256_of
from handspun.models.load import ModelSource, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_WEIGHTS = "base weights (sha256)"


def model_fingerprints(source: ModelSource, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the sha256 of chat template, tokenizer, configs, and weights, by readable names.

    For a hub model, the commit replaces the checksums of its files.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return {
        "chat template (sha256)": _sha256(json.dumps(tokenizer.chat_template, sort_keys=True)),
        "tokenizer (sha256)": _sha256(rules + special),
        **_file_fingerprints(source),
    }


def weight_checksums(source: ModelSource) -> dict[str, str]:
    """Return the sha256 of each weights file, an adapter's included; {} for a hub model."""
    folder = Path(source.location)
    if not folder.is_dir():
        return {}
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    files += sorted(source.adapter.glob("*.safetensors")) if source.adapter else []
    return {file.name: _sha256_of(file, (file.stat().st_size, file.stat().st_mtime_ns)) for file in files}


def commit_of(source: ModelSource) -> str | None:
    """Return the commit of a hub model, or None for a folder or if unknown."""
    if Path(source.location).is_dir():
        return None
    return getattr(load_config(source), "_commit_hash", None)


def _file_fingerprints(source: ModelSource) -> dict[str, str]:
    if commit := commit_of(source):
        return {"model's commit on the hub": commit}
    names = [("model's config", "config.json"), ("generation config", "generation_config.json")]
    folders = [Path(source.location), *([source.adapter] if source.adapter else [])]
    found = {
        f"{what} (sha256)": _sha256(
            json.dumps([read_json_object(folder / file) for folder in folders], sort_keys=True)
        )
        for what, file in names
    }
    weights = weight_checksums(source)
    return {**found, BASE_WEIGHTS: _sha256(json.dumps(weights, sort_keys=True))} if weights else found


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, version: tuple[int, int]) -> str:  # noqa: ARG001
    """Return the file's checksum, cached per process. version: size and modification time."""
    # The version is part of the cache's key, so a changed file is read again.
    return sha256_of(path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
