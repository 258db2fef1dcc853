"""The command line: the options of `config.py`, with hyphens.

Heavy modules are imported by the commands that need them, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from rich.console import Console

from handspun import __version__
from handspun.config import DataConfig, GenerationOptions, TrainConfig, Weights
from handspun.errors import ConfigError, HandspunError, StoppedError

if TYPE_CHECKING:
    from handspun.models.load import ChatModel

app = App(
    name="handspun",
    help="Fine-tune small chat models and decode from them, with a loop and a decoding written by hand.\n\n"
    "Every command also takes --config FILE (YAML with the same names; options given beside it win) and "
    "--traceback (the whole trace of an error).",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=()),
)

_Flat = Parameter(name="*")


@dataclass(frozen=True, kw_only=True)
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


@app.command
def train(*, config: Annotated[TrainConfig, _Flat] = TrainConfig()) -> None:  # noqa: B008  (frozen)
    """Fine-tune a model on instruction data: full, or LoRA with --lora.

    Writes checkpoint-epoch-N/ and checkpoint-best/ (ordinary transformers or peft folders), train.log,
    metrics.jsonl and run.json.
    """
    from handspun.run import train as run_training

    run_training(config)


@app.command
def preview(
    *,
    config: Annotated[DataConfig, _Flat] = DataConfig(),  # noqa: B008
    model: str = "Qwen/Qwen2.5-0.5B",
    examples: int = 3,
    plain: bool = False,
) -> None:
    """Show what would be learned: rendered examples, lengths, and the account of every row.

    Parameters
    ----------
    model
        Whose tokenizer and chat template are used; its weights are not read.
    examples
        How many rendered examples to show.
    plain
        Mark learned tokens with brackets instead of colour (also without a terminal, or under NO_COLOR).
    """
    from handspun.report.show import show_preview

    console = Console(highlight=False)
    show_preview(config, model, console, examples=examples, plain=plain or _is_colourless(console))


@app.command
def generate(
    *prompts: str,
    source: Annotated[ModelOptions, _Flat] = ModelOptions(),
    options: Annotated[GenerationOptions, _Flat] = GenerationOptions(),  # noqa: B008
    prompts_file: Path | None = None,
    system_prompt: str | None = None,
    chat: bool = True,
    batch_size: int = 8,
    json: bool = False,
    logprobs: bool = False,
    explain: bool = False,
    show_tree: bool = False,
) -> None:
    """Answer prompts: greedy, sampling (--do-sample) or beam search (--num-beams).

    Parameters
    ----------
    prompts
        What to ask; with none, and no --prompts-file, one prompt is read from standard input.
    prompts_file
        A text file with one prompt a line.
    system_prompt
        System message; if not given, the template's own default holds.
    chat
        Put prompts into the model's chat template; --no-chat takes them as they are.
    batch_size
        Rows decoded together.
    json
        One JSON object a line: text, token ids, finish reason.
    logprobs
        Log-probability of each token, in the model's own distribution (with --json).
    explain
        How each token came to be: its rank and probability, what every processor did, what was left, the draw, the
        runner-up; a table, or part of the --json. Not with beams.
    show_tree
        What a beam search looked at: all its beams, with their scores; a tree, or part of the --json.
    """
    from handspun.report.show import show_answers

    show_answers(
        _load(source),
        _prompts(prompts, prompts_file),
        options,
        Console(highlight=False),
        chat=chat,
        system_prompt=system_prompt,
        batch_size=batch_size,
        as_json=json,
        logprobs=logprobs,
        explain=explain,
        show_tree=show_tree,
    )


@app.command
def chat(
    *,
    source: Annotated[ModelOptions, _Flat] = ModelOptions(),
    options: Annotated[GenerationOptions, _Flat] = GenerationOptions(),  # noqa: B008
    system_prompt: str | None = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, /reset begins anew, /quit (or Ctrl-D) leaves.

    Parameters
    ----------
    system_prompt
        System message; if not given, the template's own default holds.
    """
    from handspun.report.show import hold_conversation

    hold_conversation(_load(source), options, Console(highlight=False), system_prompt=system_prompt)


@app.command
def demo(
    *,
    output_dir: str = "output/demo",
    num_epochs: int = 3,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Fine-tune the embedded model on the embedded data, with answers before and after (minutes, no network).

    Parameters
    ----------
    output_dir
        Folder for checkpoints, train.log, metrics.jsonl and run.json.
    num_epochs
        Passes over the 330 training rows.
    threads
        CPU threads; if not given, PyTorch's default (one per physical core).
    overwrite
        Replace an earlier run in the output folder.
    """
    from handspun.demo.run import run_demo

    run_demo(output_dir, num_epochs=num_epochs, threads=threads, overwrite=overwrite)


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0, 2 for what the user can mend, 128 + signal for a run that was
    stopped."""
    tokens = [argument for argument in arguments if argument != "--traceback"]
    errors = Console(stderr=True, highlight=False)
    try:
        tokens, app.config = _take_config(tokens)
        app(tokens, exit_on_error=False, print_error=False, result_action="return_none")
    except cyclopts.CycloptsError as error:
        command = f"{tokens[0]} " if tokens and tokens[0] in app else ""
        return _say(errors, f"{error}", f"handspun {command}--help shows what there is.")
    except StoppedError as stopped:  # the log has said it
        return stopped.exit_code
    except HandspunError as error:
        if len(tokens) < len(arguments):
            errors.print_exception()
        _say(errors, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough, and Python would say so on the way out
    return 0


def console_script() -> None:
    """What `handspun` runs."""
    sys.exit(main(sys.argv[1:]))


def _say(errors: Console, message: str, hint: str = "") -> int:
    rank = os.environ.get("RANK", "0")
    errors.print(f"[bold red]{'error' if rank == '0' else f'error on rank {rank}'}:[/]", end=" ")
    errors.print(message, markup=False, soft_wrap=True)
    if hint:
        errors.print(hint, markup=False, soft_wrap=True)
    return 2


def _take_config(tokens: list[str]) -> tuple[list[str], tuple[Any, ...]]:
    """The arguments without `--config FILE`, and that file as defaults for the command's options."""
    rest, files = [], []
    remaining = iter(tokens)
    for token in remaining:
        name, equals, value = token.partition("=")
        if name == "--config":
            files.append(value if equals else next(remaining, ""))
        else:
            rest.append(token)
    configs = [cyclopts.config.Dict(_read_yaml(file), use_commands_as_keys=False, source=file) for file in files]
    return rest, tuple(configs)


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}. Expected a YAML file of options.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {file} holds {type(content).__name__}: expected one option a line, such as `batch_size: 8`."
        )
    return {str(name).replace("_", "-"): _as_typed(value) for name, value in content.items() if value is not None}


def _as_typed(value: Any) -> Any:
    """A mapping as it is given on the command line, where it is JSON."""
    return json.dumps(value) if isinstance(value, dict) else value


def _load(source: ModelOptions) -> "ChatModel":
    import torch

    from handspun.models.load import load

    if source.threads is not None:
        torch.set_num_threads(source.threads)
    return load(source.model, weights=source.weights, device=source.device)


def _prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    found = list(prompts)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {file} cannot be read: {error}") from error
        found += [line for line in lines if line.strip()]
    if not found and not sys.stdin.isatty():
        found = [sys.stdin.read().rstrip("\n")]
    if not any(prompt.strip() for prompt in found):
        raise ConfigError('there is no prompt: give one, as in handspun generate --model M "Tell me a joke."')
    return found


def _is_colourless(console: Console) -> bool:
    return console.no_color or not console.is_terminal
