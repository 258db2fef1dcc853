"""The command-line app, and the options that several commands share."""

import gc
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import App, Parameter
from rich.console import Console

from handspun import __version__
from handspun.cli.values import check_at_least_1, convert, convert_or_refuse
from handspun.cli.views.help import GroupedHelp
from handspun.config import DataConfig, TrainConfig, Weights
from handspun.config.names import options
from handspun.config.ranges import MOST, wrong_values
from handspun.data.text_files import BYTE_ORDER_MARK, decode_text, read_text, split_lines
from handspun.display import logger
from handspun.errors import ConfigError, DataError

if TYPE_CHECKING:
    from handspun.models.load import ChatModel

app = App(
    name="handspun",
    help="Fine-tune small chat models and generate text with them, using a training loop and decoding "
    "written by hand.\n\n"
    "Every command also takes --config FILE (YAML with the same option names; the command line overrides it) and "
    "--traceback (show the full traceback of an error).",
    version=__version__,
    version_flags=("--version", "-V"),
    help_format="plaintext",
    help_formatter=GroupedHelp(),
    default_parameter=Parameter(negative_iterable=("no-",), converter=convert_or_refuse, json_list=False),
)

app.register_install_completion_command(help="Let the shell complete commands and options with the Tab key.")

FLAT = Parameter(name="*", converter=convert)
"""For a dataclass parameter: its fields are the options. The dataclass validates them itself, all at once."""
Rows = TypeVar("Rows", bound=DataConfig)
Count = Annotated[int, Parameter(validator=check_at_least_1)]
"""An integer of 1 or more."""


_COUNTS = dict.fromkeys(("threads", "batch_size"), (1, MOST, True, True))


@options
class ComputeOptions:
    """Where and how a model is computed."""

    device: str = "auto"
    """"auto" (cuda if available, else cpu), "cpu", "cuda", "cuda:1", "mps"."""

    weights: Weights = "auto"
    """Type of the weights: "auto" (float32 on a CPU, bfloat16 on a GPU), "float32", "bfloat16", "float16", or
    "int8" (a third of float32's memory, and faster, with about 1 % error per layer)."""

    threads: int | None = None
    """CPU threads. If not given, PyTorch's default (one per physical core)."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {"threads": _COUNTS["threads"]}):
            raise ConfigError(problems)


@options
class ModelOptions(ComputeOptions):
    """The model, its weights and its device."""

    model: str | None = None
    """Hub id, folder, a run's output folder (its best checkpoint), adapter folder, .gguf file, or "smollm2-135m"
    (embedded: needs no hub). Default: the run in output/ if there is one, else Qwen/Qwen2.5-0.5B."""


@options
class PromptOptions:
    """How prompts are put to a model."""

    system_prompt: str | None = None
    """System message. If not given, the chat template's default applies."""

    chat: bool = True
    """Put prompts into the model's chat template; --no-chat passes them as plain text."""

    batch_size: int = 8
    """Number of answers decoded together."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {"batch_size": _COUNTS["batch_size"]}):
            raise ConfigError(problems)


@options
class TemplateOptions:
    """The chat template and its variables."""

    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a Jinja file. If not given, the tokenizer's default."""

    template_args: tuple[str, ...] | dict[str, Any] | None = None
    """Values for the chat template's variables, such as enable_thinking=false. Repeatable."""


def with_files(config: Rows, files: Sequence[str], command: str) -> Rows:
    """Return the configuration with the files that were named without --data.

    Raises ConfigError if both name files, and if neither does and the default file is missing.
    """
    default = next(field.default for field in fields(config) if field.name == "data")
    if not files:
        if config.data == default and not os.path.lexists(default):
            raise ConfigError(
                f"no rows are named, and there is no {default} here. Name a file, as in "
                f"handspun {command} tickets.csv."
            )
        return config
    if config.data != default:
        raise ConfigError(f"{files[0]} and --data {config.sources[0]} both name rows. Use one of them.")
    data: Any = tuple(files) if len(files) > 1 else files[0]
    return replace(config, data=data)


def with_name(source: ModelOptions, name: str | None) -> ModelOptions:
    """Return the options with a model that was named without --model. Raises ConfigError if both are."""
    if name is None:
        return source
    if source.model is not None:
        raise ConfigError(f"{name} and --model {source.model} both name a model. Use one of them.")
    return replace(source, model=name)


def check_no_model_among(prompts: Sequence[str], source: ModelOptions) -> None:
    """Raise ConfigError if the first of several prompts is a model's name: `generate MODEL PROMPT`."""
    if source.model is None and len(prompts) > 1:
        path = Path(prompts[0])
        files = ("config.json", "adapter_config.json", "run.json")
        if (
            prompts[0] == "smollm2-135m"
            or path.suffix == ".gguf"
            or any((path / file).is_file() for file in files)
        ):
            raise ConfigError(f"{prompts[0]} is a model, not a prompt: write -m before it, as in -m {prompts[0]}.")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause Python's garbage collector within the block."""
    # Nearly all objects that an import makes stay. Looking through them takes a tenth of torch's import.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_model(
    source: ModelOptions, template: TemplateOptions | DataConfig | None = None, *, decodes_only: bool = False
) -> "ChatModel":
    """Load the model with the chosen chat template, and set the number of CPU threads.

    decodes_only: int8 weights, which start faster, and the tokenizer need to have only what decoding uses.
    """
    with quick_imports():
        import torch

        from handspun.models.direct import load_int8_directly
        from handspun.models.load import load

    if source.threads is not None:
        torch.set_num_threads(source.threads)
    return load(
        source.model or default_model(),
        weights=source.weights,
        device=source.device,
        chat_template=template.chat_template if template else None,
        template_args=template.template_args if template else None,
        int8_loader=load_int8_directly if decodes_only else None,
    )


def default_model() -> str:
    """Return the default output folder if a run has left a model there, else the default base model."""
    from handspun.models.load import checkpoint_of_run

    defaults = TrainConfig()
    return defaults.output_dir if checkpoint_of_run(Path(defaults.output_dir)) else defaults.model


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Return the given prompts, then those of the file (one per line); without either, standard input.

    The text of a pipe or a redirected file is added to a single prompt. Raises ConfigError if there is no prompt.
    """
    found = list(prompts)
    if file is not None:
        lines = (line.rstrip("\r\n").removeprefix(BYTE_ORDER_MARK) for line in split_lines(_text_of_prompts(file)))
        found += [line for line in lines if line.strip()]
    if not found and sys.stdin is not None and not sys.stdin.isatty():
        found = [_prompt_on_standard_input()]
    elif len(found) == 1 and _is_redirected():
        logger.info("standard input is added to the prompt (< /dev/null leaves it out)")
        found = ["\n\n".join(text for text in (found[0], _prompt_on_standard_input()) if text.strip())]
    if not any(prompt.strip() for prompt in found):
        raise ConfigError('there is no prompt. Give one, as in handspun generate --model M "Tell me a joke."')
    return found


def _is_redirected() -> bool:
    """Return whether standard input is a pipe or a file, rather than a terminal, nothing, or a server's socket."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed or replaced
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _text_of_prompts(file: Path) -> str:
    try:
        return read_text(file)
    except OSError as error:
        raise ConfigError(f"--prompts-file {file} cannot be read: {error}") from error
    except DataError as error:  # the message names the file
        raise ConfigError(f"--prompts-file {error}") from error


def _prompt_on_standard_input() -> str:
    """Return all of standard input as one prompt, decoded as a file is, whatever the terminal's encoding."""
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
    """Return whether the console shows no colors."""
    return console.no_color or not console.is_terminal
