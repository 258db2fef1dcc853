"""Data as it comes from anywhere: all that has gone wrong somewhere, made by code, with what must become of it.

python tests/helpers/hostile.py     the table of docs/data_from_anywhere.md
"""

from hostile_files import CUT_SHORT_OR_MALFORMED, ENCODINGS, NO_FILES, SIZES
from hostile_rows import CELLS, CONTENTS, CONVERSATIONS

KINDS = {
    "Cut short, malformed, or another kind of file": CUT_SHORT_OR_MALFORMED,
    "Encodings": ENCODINGS,
    "Sizes": SIZES,
    "Cells": CELLS,
    "Conversations": CONVERSATIONS,
    "Contents": CONTENTS,
    "Links, devices, folders, names": NO_FILES,
}


BACKSLASH = chr(92)


def table() -> str:
    """Markdown: every kind of input, and what happens."""
    lines = []
    for kind, cases in KINDS.items():
        lines += [f"| {kind} | |", "| --- | --- |"]
        lines += [f"| {case.name} | {case.outcome.replace('|', BACKSLASH + '|')} |" for case in cases]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
