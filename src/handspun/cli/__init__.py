"""The command line: the options of `config/`, with hyphens.

Heavy modules are imported by the commands that need them, so that `--help` answers at once.
"""

from handspun.cli import answering, evaluating, exporting, reporting, resuming, training, verifying
from handspun.cli.entry import console_script, main

__all__ = [
    "answering",
    "console_script",
    "evaluating",
    "exporting",
    "main",
    "reporting",
    "resuming",
    "training",
    "verifying",
]
