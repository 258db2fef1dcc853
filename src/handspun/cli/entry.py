"""Run one command from its arguments, and turn its errors into an exit code."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import cyclopts

from handspun.cli.app import app
from handspun.cli.views.help import COMMANDS
from handspun.config import option_name, unknown_option
from handspun.config.spelling import command_line
from handspun.display import (
    HarmlessConsole,
    UnprintedError,
    abandon_unwritten,
    open_missing_streams,
    print_error_line,
    protected_streams,
)
from handspun.errors import ConfigError, HandspunError, StoppedError


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a failed verification, 2 an error that the user can fix, 128 + signal a stopped run.
    """
    tokens = [argument for argument in arguments if argument != "--traceback"]
    try:
        with protected_streams(), command_line():
            return _run(tokens, with_traceback="--traceback" in arguments)
    except UnprintedError as unprinted:
        return _output_error_code(unprinted)


def _run(tokens: list[str], *, with_traceback: bool) -> int:
    errors = HarmlessConsole(stderr=True)
    try:
        if sorted(tokens) == ["--verbose", "--version"]:
            from handspun.runs.record import environment_lines  # imports torch

            HarmlessConsole().print("\n".join(environment_lines()), markup=False, soft_wrap=True)
            return 0
        tokens, app.config = _take_config(expand_aliases(expand_commands(tokens)))
        app(tokens, exit_on_error=False, print_error=False, result_action="return_none")
    except UnprintedError:
        raise
    except cyclopts.UnknownOptionError as error:
        problems = _unknown_options(error, tokens) + _wrong_values(tokens)
        return _print_error(errors, "\n".join(problems), _help_hint(tokens))
    except cyclopts.CycloptsError as error:
        return _print_error(errors, _with_unknown_options(_message(error, tokens), tokens), _help_hint(tokens))
    except StoppedError as stopped:  # already logged
        return stopped.exit_code
    except HandspunError as error:
        if with_traceback:
            errors.print_exception()
        wrong_value = isinstance(error, ConfigError)  # it may have ended the parsing before an unknown option
        _print_error(errors, _with_unknown_options(str(error), tokens) if wrong_value else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        app.config = ()
    return 0


def _output_error_code(error: UnprintedError) -> int:
    """Return the exit code for output that could not be written."""
    if error.is_unread:  # the reader of a pipe has closed it, as `head` does
        return 0
    print_error_line(f"error: {error}")
    return error.exit_code


def console_script() -> None:
    """Run the `handspun` console script."""
    open_missing_streams()
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        abandon_unwritten()


def _print_error(errors: HarmlessConsole, message: str, hint: str = "") -> int:
    rank = os.environ.get("RANK", "0")
    errors.print("error:" if rank == "0" else f"error on rank {rank}:", style="bold red", end=" ")
    errors.print(message, soft_wrap=True)
    if hint:
        errors.print(hint, soft_wrap=True)
    return 2


ALIASES = {
    "-m": "--model",
    "--lr": "--learning-rate",
    "--epochs": "--num-epochs",
    "--batch": "--batch-size",
    "--rank": "--lora-rank",
}
"""Short names that people know from other tools, and the options that they stand for."""


def expand_aliases(tokens: list[str]) -> list[str]:
    """Return the arguments with options by their own names. `generate -p TEXT` is the prompt TEXT."""
    expanded: list[str] = []
    for number, token in enumerate(tokens):
        if token == "--":  # what follows are no options
            return expanded + tokens[number:]
        name, equals, value = token.partition("=")
        if token != "-p" or tokens[0] != "generate":
            expanded.append(ALIASES.get(name, name) + equals + value)
    return expanded


def _take_config(tokens: list[str]) -> tuple[list[str], tuple[Any, ...]]:
    """Return the arguments without `--config FILE`, and the files' options as defaults for the command."""
    rest, files = [], []
    remaining = iter(tokens)
    for token in remaining:
        name, equals, value = token.partition("=")
        if name == "--config":
            files.append(value if equals else next(remaining, ""))
        else:
            rest.append(token)
    if not files:
        return rest, ()
    from handspun.cli.config_file import read_config_file  # imports yaml, which most commands do not need

    configs = [
        cyclopts.config.Dict(read_config_file(file), use_commands_as_keys=False, source=file) for file in files
    ]
    return rest, tuple(configs)


def _message(error: cyclopts.CycloptsError, tokens: list[str]) -> str:
    """Return what is wrong with the arguments, and what to do."""
    name = error.argument.name if error.argument is not None else ""
    if isinstance(error, cyclopts.ValidationError) and error.argument is not None and error.argument.tokens:
        return f"{name} is {error.argument.tokens[0].value}: {error.exception_message}"
    if isinstance(error, cyclopts.UnknownCommandError):
        near = difflib.get_close_matches(tokens[0], COMMANDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"there is no command {tokens[0]}.{hint} Commands: {', '.join(COMMANDS)}."
    if isinstance(error, cyclopts.UnusedCliTokensError):
        left = ", ".join(error.unused_tokens or ())
        return f"{left}: no option, and {tokens[0]} takes no such argument. Write a value right after its option."
    if isinstance(error, cyclopts.MissingArgumentError) and name:
        if name in tokens:
            return f"{name} has no value. Write one after it."
        what = f"{name} is missing" if name.startswith("--") and tokens[0] != "compare" else "a model is missing"
        return f"{what}. Usage: handspun {USAGE.get(tokens[0], tokens[0] + ' [OPTIONS]')}."
    return str(error)


USAGE = {"compare": "compare MODEL_A MODEL_B [OPTIONS]", "export": "export MODEL [OPTIONS]"}
"""How to call the commands that need an argument."""


def expand_commands(tokens: list[str]) -> list[str]:
    """Return the arguments with `help COMMAND` as `COMMAND --help`, and export's model as its option."""
    if tokens[:1] == ["help"]:
        return [*tokens[1:2], "--help"]
    if tokens[:1] == ["export"] and len(tokens) > 1 and not tokens[1].startswith("-"):
        return ["export", "--model", *tokens[1:]]
    return tokens


def _help_hint(tokens: list[str]) -> str:
    command = f"{tokens[0]} " if tokens and tokens[0] in app else ""
    return f"See handspun {command}--help for all options."


def _unknown_options(error: cyclopts.UnknownOptionError, tokens: list[str]) -> list[str]:
    """Return one message per unknown option, from the config file or the command line."""
    if error.token.source == "cli":
        return _unknown_in(tokens, error.argument_collection) or [f"{error}"]
    config = next(config for config in app.config if config.source == error.token.source)
    where = f"--config {error.token.source}: "
    found = _unknown_in([f"--{name}" for name in config.config], error.argument_collection)
    return [f"{where}{text}" for text in found] or [f"{error}"]


def _wrong_values(tokens: list[str]) -> list[str]:
    """Return the problems with the values of known options, which the parser has not read after an unknown one."""
    arguments = app[tokens[0]].assemble_argument_collection(parse_docstring=False)
    try:
        app.parse_args(
            [one for one in tokens if not _unknown_in([one], arguments)], exit_on_error=False, print_error=False
        )
    except ConfigError as error:
        return error.problems
    except cyclopts.CycloptsError:  # the value of an unknown option is left over
        pass
    return []


def _with_unknown_options(message: str, tokens: list[str]) -> str:
    """Return the message about a wrong value, and one line per unknown option, which the parser reports later."""
    if not tokens or tokens[0] not in app:
        return message
    known = app[tokens[0]].assemble_argument_collection(parse_docstring=False)
    return "\n".join([message, *_unknown_in(tokens[1:], known)])


def _unknown_in(tokens: list[str], arguments: cyclopts.ArgumentCollection) -> list[str]:
    known = {name.lstrip("-").replace("-", "_") for one in arguments for name in one.names}
    given = [token.lstrip("-") for token in tokens if token.startswith("-") and token.strip("-")]
    names = dict.fromkeys(re.split("[=.]", name)[0].replace("-", "_") for name in given)
    unknown = [name for name in names if name not in known and name.removeprefix("no_") not in known]
    return [unknown_option(name, known, option_name) for name in unknown if not name[:1].isdigit()]
