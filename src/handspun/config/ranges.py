"""Which numbers an option may have, and how an option is called."""

from typing import Any

Ranges = dict[str, tuple[float, float, bool, bool]]
"""By name: lowest, highest, is the lowest itself allowed, is the highest itself allowed."""


def option_name(name: str) -> str:
    """`batch_size` as it is typed: `--batch-size`."""
    return "--" + name.replace("_", "-")


def numbers_out_of_range(config: Any, ranges: Ranges) -> list[str]:
    """What is wrong with the numbers, each with what was expected; None is not given, and right."""
    problems = []
    for name, (low, high, low_allowed, high_allowed) in ranges.items():
        value = getattr(config, name)
        if value is None:
            continue
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):
            wanted = f"{'at least' if low_allowed else 'more than'} {low:g}"
            if high != float("inf"):
                wanted += f" and {'at most' if high_allowed else 'less than'} {high:g}"
            problems.append(f"{option_name(name)} is {value}: expected {wanted}.")
    return problems
