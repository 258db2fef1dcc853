"""The command verify-resume."""

import random
import sys
from typing import Annotated

from handspun.cli.app import FLAT, Count, app
from handspun.config import TrainConfig
from handspun.display import HarmlessConsole, log_lines_to, unfailing


@app.command(name="verify-resume")
def verify_resume(
    *,
    config: Annotated[TrainConfig, FLAT] = TrainConfig(),  # noqa: B008
    steps: Count = 12,
    kills: Count = 3,
) -> None:
    """Kill a short run at random moments, resume it, and compare its weights with an uninterrupted run's.

    Takes the options of train, but ignores --output-dir and --num-epochs. Exits with 1 if a single bit differs.

    Parameters
    ----------
    steps
        Optimizer steps of the run, in two epochs over the first rows.
    kills
        Number of times the run is killed.
    """
    from handspun.verification.resume_check import kill_and_compare

    console = HarmlessConsole(file=unfailing(sys.stdout))

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with log_lines_to(say):
        compared = kill_and_compare(config, steps=steps, kills=kills, rng=random.Random(config.seed))
    for name, expected in compared.undisturbed.items():
        found = compared.killed.get(name, "missing")
        same = "same     " if found == expected else "DIFFERENT"
        say(f"{same}  {name}  sha256 {found[:16]}, undisturbed {expected[:16]}")
    if not compared.same:
        say("The killed run ended with different weights: resuming is not exact on this machine.")
        sys.exit(1)
    say(f"After {len(compared.kills)} kills, the weights are bit-identical to those of an uninterrupted run.")
