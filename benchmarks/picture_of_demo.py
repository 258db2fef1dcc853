"""The end of the demonstration, as a picture for the README.

handspun demo --overwrite | tee demo.log
python benchmarks/picture_of_demo.py demo.log --svg docs/images/demo.svg
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

FIRST, LAST = "Right answers to", "135M parameters learn"


def main() -> None:
    """Draw the lines from the table of right answers on, as a terminal of 80 columns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--svg", type=Path, required=True)
    given = parser.parse_args()
    lines = given.log.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if FIRST in line)
    end = next(number for number, line in enumerate(lines) if LAST in line)
    console = Console(file=io.StringIO(), record=True, width=80, force_terminal=True, color_system="truecolor")
    for line in lines[start:end]:
        console.print(Text(line, style="bold green" if line.startswith("│ all") else ""))
    svg = console.export_svg(title="handspun demo")
    # Its fonts would come from the network.
    given.svg.write_text(re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
