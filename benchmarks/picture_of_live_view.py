"""Draws the panel of a run, as it stood at one of its steps, as an SVG that fetches nothing.

    python benchmarks/picture_of_live_view.py output --step 90 --svg docs/images/live.svg

It reads the run's run.json and metrics.jsonl.
"""

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from handspun.runs.live import LiveState, panel
from handspun.runs.sample_answers import SampleAnswer, Samples
from handspun.training.loop import Evaluation, Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's output folder")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--svg", type=Path, required=True)
    given = parser.parse_args()
    given.svg.write_text(picture(given.folder, given.step), encoding="utf-8")


def picture(folder: Path, last: int) -> str:
    """The panel behind a step, 80 columns wide."""
    state, seconds = state_at(folder, last)
    console = Console(file=io.StringIO(), record=True, width=80, force_terminal=True, color_system="truecolor")
    console.print(panel(state, width=80, elapsed=seconds))
    svg = console.export_svg(title="handspun train")
    return re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)  # they would come from the network


def state_at(folder: Path, last: int) -> tuple[LiveState, float]:
    """What was seen behind a step, and the seconds that the steps up to it took."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = [event for event in events if event["event"] == "samples"]
    state = LiveState(
        total_steps=facts["plan"]["steps"],
        num_epochs=facts["config"]["num_epochs"],
        held_out=facts["data"]["held_out"] is not None,
        prompts=tuple(answer["prompt"] for answer in samples[0]["answers"]) if samples else (),
    )
    seconds = 0.0
    for event in events:
        if event["step"] > last:
            break
        seconds += event.get("seconds", 0.0)
        left = seconds / max(event["step"], 1) * (state.total_steps - event["step"])
        state.see(event_of(event), memory=event.get("memory_bytes"), seconds_left=left)
    return state, seconds


def event_of(facts: dict[str, Any]) -> object:
    """The event that a line of metrics.jsonl was made of; None for what the panel does not show."""
    values = {name: value for name, value in facts.items() if name not in ("event", "memory_bytes")}
    if facts["event"] == "step":
        return Step(**values)
    if facts["event"] == "evaluation":
        return Evaluation(**values)
    if facts["event"] == "samples":
        return Samples(**{**values, "answers": [SampleAnswer(**answer) for answer in values["answers"]]})
    return None


if __name__ == "__main__":
    main()
