"""From arguments to one command, and from its errors to an exit code."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import cyclopts

from handspun.cli.app import app
from handspun.config import option_name, unknown_option
from handspun.display import (
    HarmlessConsole,
    UnprintedError,
    abandon_unwritten,
    open_missing_streams,
    protected_streams,
    say,
)
from handspun.errors import HandspunError, StoppedError


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0, 1 for a verification that has failed, 2 for what the user can
    mend, 128 + signal for a run that was stopped."""
    tokens = [argument for argument in arguments if argument != "--traceback"]
    try:
        with protected_streams():
            return _run(tokens, with_traceback="--traceback" in arguments)
    except UnprintedError as unprinted:
        return _unprinted(unprinted)


def _run(tokens: list[str], *, with_traceback: bool) -> int:
    errors = HarmlessConsole(stderr=True)
    try:
        tokens, app.config = _take_config(tokens)
        app(tokens, exit_on_error=False, print_error=False, result_action="return_none")
    except UnprintedError:
        raise
    except cyclopts.UnknownOptionError as error:
        return _say(errors, "\n".join(_unknown_options(error, tokens)), _help_of(tokens))
    except cyclopts.ValidationError as error:
        return _say(errors, _refused(error), _help_of(tokens))
    except cyclopts.CycloptsError as error:
        return _say(errors, f"{error}", _help_of(tokens))
    except StoppedError as stopped:  # the log has said it
        return stopped.exit_code
    except HandspunError as error:
        if with_traceback:
            errors.print_exception()
        _say(errors, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        app.config = ()
    return 0


def _unprinted(error: UnprintedError) -> int:
    """A reader that has gone has seen enough; anything else lost what was asked for."""
    if error.is_unread:
        return 0
    say(f"error: {error}")
    return error.exit_code


def console_script() -> None:
    """What `handspun` runs."""
    open_missing_streams()
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        abandon_unwritten()


def _say(errors: HarmlessConsole, message: str, hint: str = "") -> int:
    rank = os.environ.get("RANK", "0")
    errors.print("error:" if rank == "0" else f"error on rank {rank}:", style="bold red", end=" ")
    errors.print(message, soft_wrap=True)
    if hint:
        errors.print(hint, soft_wrap=True)
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
    if not files:
        return rest, ()
    from handspun.cli.config_file import read_config_file  # it takes yaml, which most commands do without

    configs = [
        cyclopts.config.Dict(read_config_file(file), use_commands_as_keys=False, source=file) for file in files
    ]
    return rest, tuple(configs)


def _refused(error: cyclopts.ValidationError) -> str:
    if error.argument is None or not error.argument.tokens:
        return str(error)
    return f"{error.argument.name} is {error.argument.tokens[0].value}: {error.exception_message}"


def _help_of(tokens: list[str]) -> str:
    command = f"{tokens[0]} " if tokens and tokens[0] in app else ""
    return f"handspun {command}--help shows what there is."


def _unknown_options(error: cyclopts.UnknownOptionError, tokens: list[str]) -> list[str]:
    """What to say of all options that the command does not have, of a config file's or of the command line's."""
    known = {name.lstrip("-").replace("-", "_") for one in error.argument_collection for name in one.names}
    if error.token.source == "cli":
        given, where = [token for token in tokens if token.startswith("-") and token.strip("-")], ""
    else:
        config = next(config for config in app.config if config.source == error.token.source)
        given, where = list(config.config), f"--config {error.token.source}: "
    names = [re.split("[=.]", name.lstrip("-"))[0].replace("-", "_") for name in given]
    unknown = [
        name for name in dict.fromkeys(names) if name not in known and name.removeprefix("no_") not in known
    ]
    found = [unknown_option(name, known, option_name) for name in unknown if not name[:1].isdigit()]
    return [f"{where}{text}" for text in found] or [f"{error}"]
