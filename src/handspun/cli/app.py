"""The app that the commands join, and what several of them take."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from handspun import __version__
from handspun.cli.values import check_at_least_1, convert, convert_or_refuse
from handspun.config import DataConfig, Weights
from handspun.config.names import options
from handspun.config.ranges import MOST, wrong_values
from handspun.data.text_files import BYTE_ORDER_MARK, decode_text, read_text, split_lines
from handspun.errors import ConfigError, DataError

if TYPE_CHECKING:
    from handspun.models.load import ChatModel

app = App(
    name="handspun",
    help="Fine-tune small chat models and decode from them, with a loop and a decoding written by hand.\n\n"
    "Every command also takes --config FILE (YAML with the same names; options given beside it win) and "
    "--traceback (the whole trace of an error).",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=("no-",), converter=convert_or_refuse, json_list=False),
)

FLAT = Parameter(name="*", converter=convert)
"""Of a dataclass: its fields are the options, and it checks them itself, all at once."""
Count = Annotated[int, Parameter(validator=check_at_least_1)]
"""A whole number, 1 or more."""


@options
class ModelOptions:
    """Which model, and how it is held."""

    model: str = "Qwen/Qwen2.5-0.5B"
    """Hub id, folder, adapter folder, .gguf file, or "smollm2-135m" (embedded: needs no network)."""

    device: str = "auto"
    """"auto" (cuda where there is one, else cpu), "cpu", "cuda", "cuda:1", "mps"."""

    weights: Weights = "auto"
    """Type of the weights: "auto" (float32 on a CPU, bfloat16 on a GPU), "float32", "bfloat16", "float16", or
    "int8": a third of float32's weights in memory, and faster, at about 1 % error a layer."""

    threads: int | None = None
    """CPU threads; if not given, PyTorch's default (one per physical core)."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {"threads": (1, MOST, True, True)}):
            raise ConfigError(problems)


@options
class TemplateOptions:
    """How conversations become text."""

    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a Jinja file; if not given, the tokenizer's own."""

    template_args: tuple[str, ...] | dict[str, Any] | None = None
    """Values for the chat template's variables, as in enable_thinking=false; may be given more than once."""


def load_model(source: ModelOptions, template: TemplateOptions | DataConfig | None = None) -> "ChatModel":
    """The model on its threads, with the chosen chat template."""
    import torch

    from handspun.models.load import load

    if source.threads is not None:
        torch.set_num_threads(source.threads)
    return load(
        source.model,
        weights=source.weights,
        device=source.device,
        chat_template=template.chat_template if template else None,
        template_args=template.template_args if template else None,
    )


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Those given, then those of the file, one a line; with neither, standard input. ConfigError without any."""
    found = list(prompts)
    if file is not None:
        lines = (line.rstrip("\r\n").removeprefix(BYTE_ORDER_MARK) for line in split_lines(_text_of_prompts(file)))
        found += [line for line in lines if line.strip()]
    if not found and sys.stdin is not None and not sys.stdin.isatty():
        found = [_prompt_on_standard_input()]
    if not any(prompt.strip() for prompt in found):
        raise ConfigError('there is no prompt: give one, as in handspun generate --model M "Tell me a joke."')
    return found


def _text_of_prompts(file: Path) -> str:
    try:
        return read_text(file)
    except OSError as error:
        raise ConfigError(f"--prompts-file {file} cannot be read: {error}") from error
    except DataError as error:  # it names the file
        raise ConfigError(f"--prompts-file {error}") from error


def _prompt_on_standard_input() -> str:
    """All of it is one prompt, read as a file is, whatever encoding the terminal has."""
    try:
        if hasattr(sys.stdin, "buffer"):
            lines = split_lines(decode_text(sys.stdin.buffer.read(), ""))
            text = "".join(line.rstrip("\r\n") + "\n" for line in lines)
        else:
            text = sys.stdin.read()
    except (OSError, DataError) as error:
        raise ConfigError(f"the prompt on standard input cannot be read: {error}") from error
    return text.rstrip("\n")


def is_colorless(console: Console) -> bool:
    """Whether nothing that is shown can be told by its color."""
    return console.no_color or not console.is_terminal
