"""Options of `handspun export`."""

from pathlib import Path
from typing import Literal

from handspun.config.names import options
from handspun.config.ranges import wrong_values
from handspun.errors import ConfigError

GgufType = Literal["f32", "f16", "q8_0", "q5_0", "q4_0"]


@options
class ExportConfig:
    """What to export from a model, and where."""

    model: str
    """Checkpoint or any other model: folder, adapter folder, hub id, .gguf file, or "smollm2-135m"."""

    output_dir: str | None = None
    """Folder for the exported files. Required for --merge and --gguf."""

    merge: bool = False
    """Write a plain transformers folder, with LoRA adapters merged into their base."""

    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the merged weights. bfloat16 halves the files, with stochastic rounding to preserve the mean."""

    gguf: GgufType | None = None
    """Write a GGUF file of this type, including tokenizer and chat template. For Llama, Mistral, Qwen2 and
    Qwen3."""

    push: str | None = None
    """Upload to this repository on the hub (your-name/model-name): the exported files, or else the model's
    folder."""

    private: bool = True
    """Make a repository that --push creates private. --no-private makes it public."""

    token: str | None = None
    """Token for --push. Default: HF_TOKEN."""

    overwrite: bool = False
    """Replace the contents of the output folder."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {}):
            raise ConfigError(problems)
        if not (self.makes or self.push):
            problems.append("nothing to do: add --merge, --gguf or --push REPO, or several of them.")
        if self.makes and self.output_dir is None:
            problems.append("--output-dir is missing. Name the folder to write.")
        if self.push and not self.makes and not Path(self.model).is_dir():
            problems.append(f"--push uploads a folder, but {self.model} is not one. Add --merge or --gguf.")
        if problems:
            raise ConfigError(problems)

    @property
    def makes(self) -> bool:
        """True if files are written."""
        return self.merge or self.gguf is not None

    @property
    def folder(self) -> Path:
        """Folder of the exported files, or else the model's own folder."""
        return Path(self.output_dir if self.output_dir is not None and self.makes else self.model)
