"""Options of `handspun export`."""

from pathlib import Path
from typing import Literal

from handspun.config.names import options
from handspun.config.ranges import wrong_values
from handspun.errors import ConfigError

GgufType = Literal["f32", "f16", "q8_0"]


@options
class ExportConfig:
    """What is made of a model, and where."""

    model: str
    """Checkpoint or any other model: folder, adapter folder, hub id, .gguf file, or "smollm2-135m"."""

    output_dir: str | None = None
    """Folder for what is made; needed for --merge and --gguf."""

    merge: bool = False
    """Write an ordinary transformers folder, LoRA adapters merged into their base."""

    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the merged weights; bfloat16 halves the files and rounds, at random, so that in the mean nothing is
    lost."""

    gguf: GgufType | None = None
    """Write a GGUF file of this type, tokenizer and chat template included: of Llama, Mistral, Qwen2 and Qwen3."""

    push: str | None = None
    """Upload to this repository on the hub (your-name/model-name): what was made, or else the model's folder."""

    private: bool = True
    """A repository that is made by --push is private; --no-private makes it public."""

    token: str | None = None
    """Token for --push; if not given, HF_TOKEN's."""

    overwrite: bool = False
    """Replace what is in the output folder."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {}):
            raise ConfigError(problems)
        if not (self.makes or self.push):
            problems.append("nothing to do: give --merge, --gguf or --push REPO, or several of them.")
        if self.makes and self.output_dir is None:
            problems.append("--output-dir is missing: name the folder that is to be written.")
        if self.push and not self.makes and not Path(self.model).is_dir():
            problems.append(f"--push sends a folder, and {self.model} is none: add --merge or --gguf.")
        if problems:
            raise ConfigError(problems)

    @property
    def makes(self) -> bool:
        """Whether files are written, besides what may be pushed."""
        return self.merge or self.gguf is not None

    @property
    def folder(self) -> Path:
        """Where they are, or the model's own folder."""
        return Path(self.output_dir if self.output_dir is not None and self.makes else self.model)
