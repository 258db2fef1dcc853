"""From arguments to one command, and from its errors to an exit code."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts

from handspun.cli.app import app
from handspun.display import (
    HarmlessConsole,
    UnprintedError,
    abandon_unwritten,
    open_missing_streams,
    protected_streams,
    say,
)
from handspun.errors import ConfigError, HandspunError, StoppedError


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
    except cyclopts.CycloptsError as error:
        command = f"{tokens[0]} " if tokens and tokens[0] in app else ""
        return _say(errors, f"{error}", f"handspun {command}--help shows what there is.")
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
    configs = [cyclopts.config.Dict(_read_yaml(file), use_commands_as_keys=False, source=file) for file in files]
    return rest, tuple(configs)


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}. Expected a YAML file of options.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {file} holds {type(content).__name__}: expected one option a line, such as `batch_size: 8`."
        )
    return {str(name).replace("_", "-"): _as_typed(value) for name, value in content.items() if value is not None}


def _as_typed(value: Any) -> Any:
    """A mapping as it is given on the command line, where it is JSON."""
    return json.dumps(value) if isinstance(value, dict) else value
