"""The command line. Options are the fields of the dataclasses in `config/`, with hyphens.

Heavy modules are imported inside the commands that need them, so that `--help` is fast.
"""

from handspun.cli import answering, evaluating, exporting, reporting, resuming, serving, training, verifying
from handspun.cli.app import app
from handspun.cli.entry import console_script, main
from handspun.cli.views.help import COMMANDS, epilogue

for command in COMMANDS:
    app[command].help_epilogue = epilogue(command)

__all__ = [
    "answering",
    "console_script",
    "evaluating",
    "exporting",
    "main",
    "reporting",
    "resuming",
    "serving",
    "training",
    "verifying",
]
