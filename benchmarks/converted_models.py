"""A model in the formats of the engines that have one of their own, made once, in a cache folder."""

import hashlib
import os
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME, embedded_gguf
from measurements import Contender, run_process


def ctranslate2_int8(folder: Path, contender: Contender) -> str:
    """A folder of CTranslate2."""
    converter = contender.python.parent / "ct2-transformers-converter"
    return _converted(
        folder, "ctranslate2-int8", [converter, "--model", folder, "--quantization", "int8", "--output_dir"]
    )


def openvino_int8(folder: Path, contender: Contender) -> str:
    """A folder of OpenVINO."""
    export: list[str | Path] = [contender.python.parent / "optimum-cli", "export", "openvino", "--model", folder]
    options = ["--task", "text-generation-with-past", "--weight-format", "int8"]
    return _converted(folder, "openvino-int8", [*export, *options])


def gguf_file(model: str, given: Path | None) -> str | None:
    """The file that is given or the embedded model's own one; else none (llama-cpp-python converts nothing)."""
    if given:
        return str(given)
    return str(embedded_gguf()) if model == EMBEDDED_NAME else None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/handspun-benchmarks, by default ~/.cache/handspun-benchmarks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handspun-benchmarks"


def _converted(folder: Path, name: str, command: list[str | Path]) -> str:
    """What the command writes into the folder that it is given last; made once for the weights that there are."""
    converted = cache_folder() / f"{folder.name}-{_digest(folder)}" / name
    if not converted.exists():
        converted.parent.mkdir(parents=True, exist_ok=True)
        print(f"converting {folder} into {converted} (once)", flush=True)
        with tempfile.TemporaryDirectory(dir=converted.parent) as work:
            run_process([*command, Path(work) / "model"])
            (Path(work) / "model").rename(converted)
    return str(converted)


def _digest(folder: Path) -> str:
    """Eight digits that change with the weights' files."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))
    ]
    return hashlib.sha256(repr((folder.resolve(), files)).encode()).hexdigest()[:8]
