"""The command line. Options are the fields of the dataclasses in `config/`, with hyphens.

Heavy modules are imported inside the commands that need them, so that `--help` is fast.
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
