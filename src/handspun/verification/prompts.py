"""What is asked if the user names no prompts: short and long, two languages, code."""

DEFAULT_PROMPTS = (
    "Name a colour.",
    "Is 7 a prime number? Answer yes or no.",
    "Why is the sky blue? Answer in one sentence.",
    "请用一句话介绍上海。",
    "What does this function return for [3, 1, 2]?\n\n"
    "def f(values: list[int]) -> list[int]:\n"
    "    if len(values) < 2:\n"
    "        return values\n"
    "    first, *rest = values\n"
    "    return f([v for v in rest if v < first]) + [first] + f([v for v in rest if v >= first])\n",
    "Summarise this text in one sentence.\n\n"
    "The spinning wheel came to Europe in the Middle Ages, and for some centuries it stood in nearly every house. "
    "Before it there was the spindle: a stick with a weight, which a spinner set turning with one hand, while the "
    "other drew the fibres out. It took five to ten spinners to keep one weaver at work. The wheel turned the "
    "spindle by a cord, and so one hand became free, and the thread more even. In 1764 James Hargreaves, a weaver "
    "from Lancashire, put eight spindles into one frame, and a single wheel turned them all.",
)
"""Prompts for `handspun verify`."""
