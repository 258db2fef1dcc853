"""How deep values stand in each other: Python can read more than it can walk through again."""

from typing import Any

MOST_LEVELS = 100


def is_nested_deeper(value: Any, most: int = MOST_LEVELS) -> bool:
    """Whether lists and objects stand in each other more than `most` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True
