"""The chat page in a real browser: how soon it is painted, and how long keys wait while an answer streams.

    PYTHONPATH=src:tests/helpers python benchmarks/chat_page_in_a_browser.py

A script writes the answers in the model's place. First the page is opened for the first time, again and again.
Then answers come at 32 tokens per second beside a conversation of 20,000 tokens, 1,000 messages are opened, and
answers of 20,000 tokens come as fast as they can. Chromium's headless shell does it (Debian:
chromium-headless-shell). Numbers depend on what else the machine does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from chat_page import LAST, Actor, acted, choose_file, last_answer, say
from chromium import Chromium
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

PARAGRAPH = (
    "Here is **one** point of several, with `code`, a [link](https://a.example/b) and enough words to wrap on a "
    "line of the page, as answers of models have them.\n\n"
)
LIST = "1. An item of a long list with **some** words in it, and a few more of them.\n"
CODE = "    total = sum(value for value in values)  # a line of code\n"
WATCH = """
    (() => {
        const isWatched = "gaps" in window;
        gaps = []; tasks = []; keys = [];
        if (isWatched) return;
        let last = performance.now();
        const step = (now) => { gaps.push(now - last); last = now; requestAnimationFrame(step); };
        requestAnimationFrame(step);
        new PerformanceObserver((list) => list.getEntries().forEach((one) => tasks.push(one.duration)))
            .observe({ type: "longtask" });
        new PerformanceObserver((list) => list.getEntries().forEach((one) => keys.push(one.duration)))
            .observe({ type: "event", durationThreshold: 16 });
    })()
"""


@contextmanager
def new_tab(url: str) -> Iterator[Chromium]:
    """A browser that has never been there."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Chromium(Path(profile)) as tab:
        tab.open(url)
        yield tab


def paints(url: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from the start of the navigation to the first paint, and until a message can be sent."""
    found: dict[str, list[float]] = {
        "first paint": [],
        "first paint, seen before": [],
        "ready": [],
        "an empty page": [],
    }
    for _ in range(rounds):
        with new_tab(url) as tab:
            found["first paint"].append(first_paint(tab))
            found["ready"].append(float(tab.run("performance.getEntriesByName('ready')[0].startTime")))
            tab.open(url)
            found["first paint, seen before"].append(first_paint(tab))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Chromium(Path(profile)) as tab:
            tab.call("Page.navigate", url=f"{url}health")
            found["an empty page"].append(first_paint(tab))
    return found


def first_paint(tab: Chromium) -> float:
    """Milliseconds from the start of the navigation."""
    name = "performance.getEntriesByName('first-contentful-paint')"
    return float(tab.until(f"location.protocol === 'http:' && {name}.length && {name}[0].startTime"))


def conversation(tokens: int, messages: int) -> str:
    """A conversation as a line of JSON, of about so many tokens of four characters."""
    text = PARAGRAPH * max(1, 4 * tokens // messages // len(PARAGRAPH))
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number in range(messages)]
    return json.dumps({"messages": turns}) + "\n"


def type_and_scroll(tab: Chromium, seconds: float) -> None:
    """Press eight keys per second, and turn the wheel as often."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tab.press("x")
        tab.call("Input.insertText", text="x")
        tab.call("Input.dispatchMouseEvent", type="mouseWheel", x=700, y=400, deltaX=0, deltaY=-120)
        time.sleep(0.12)


def watched(tab: Chromium) -> str:
    """What was seen since WATCH ran, in words."""
    seen: dict[str, list[float]] = tab.run("({ gaps, tasks, keys })")
    frames = sorted(seen["gaps"][1:])
    late = sum(one > 50 for one in frames)
    return (
        f"{len(frames)} frames: median {statistics.median(frames):.0f} ms, 99 % under "
        f"{frames[int(0.99 * len(frames))]:.0f} ms, longest {frames[-1]:.0f} ms, {late} over 50 ms; "
        f"{len(seen['tasks'])} tasks over 50 ms (longest {max(seen['tasks'], default=0):.0f}); "
        f"slowest key or wheel {max(seen['keys'], default=0):.0f} ms"
    )


def opened(tab: Chromium, *, tokens: int, messages: int) -> str:
    """Import a conversation and open it. Return what was seen meanwhile."""
    tab.run(WATCH)
    choose_file(tab, conversation(tokens, messages))
    tab.until(f"document.querySelectorAll('.message').length === {messages}")
    time.sleep(1)
    return watched(tab)


def streams(url: str, actor: Actor, seconds: float) -> Iterator[tuple[str, str]]:
    """Yield what is streamed, and how the frames were, for each kind of answer."""
    actor.seconds, actor.size = 1 / 32, 4
    texts = {
        "paragraphs, at 32 tokens per second": PARAGRAPH * 60,
        "one list": LIST * 100,
        "one block of code": "```python\n" + CODE * 100,
    }
    with new_tab(url) as tab:
        yield "opening a conversation of 20,000 tokens", opened(tab, tokens=20_000, messages=40)
        for name, text in texts.items():
            actor.text = text
            say(tab, "go")
            tab.until(f"{LAST}?.querySelector('.body').textContent.length > 40")
            tab.run(WATCH)
            type_and_scroll(tab, seconds)
            yield f"beside 20,000 tokens: {name}", watched(tab)
            tab.press("Escape")
            last_answer(tab)
            tab.run("document.querySelector('#prompt').value = ''")


def long_answers(url: str, actor: Actor) -> Iterator[tuple[str, str]]:
    """Yield the frames of answers of 20,000 tokens that come as fast as they can be sent."""
    actor.seconds, actor.size = 0.001, 16
    for name, text in {"paragraphs": PARAGRAPH, "one list": LIST, "one block of code": CODE}.items():
        actor.text = ("```python\n" if text == CODE else "") + text * (80_000 // len(text))
        with new_tab(url) as tab:
            say(tab, "go")
            tab.until(f"{LAST}?.querySelector('.body').textContent.length > 40")
            tab.run(WATCH)
            last_answer(tab, seconds=200)
            yield f"an answer of 20,000 tokens in {name}, to its end", watched(tab)


def many_messages(url: str) -> Iterator[tuple[str, str]]:
    """Yield the frames while 1,000 messages are opened, scrolled through, and added to."""
    with new_tab(url) as tab:
        yield "opening 1,000 messages", opened(tab, tokens=100_000, messages=1000)
        tab.run(WATCH)
        for _ in range(40):
            tab.call("Input.dispatchMouseEvent", type="mouseWheel", x=700, y=400, deltaX=0, deltaY=-900)
            time.sleep(0.05)
        yield "scrolling up through them", watched(tab)
        tab.run(WATCH)
        say(tab, "hello")
        last_answer(tab)
        yield "one more message", watched(tab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often the page is opened for the first time")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of typing beside each stream")
    parser.add_argument("--paint-only", action="store_true")
    given = parser.parse_args()
    chat = ChatModel(tiny_model("qwen2", initializer_range=0.02), tiny_tokenizer(), "tiny")
    actor = Actor()
    with acted(chat, actor, ServeOptions(log_requests=False)) as url:
        for name, times in paints(url, given.rounds).items():
            listed: Any = ", ".join(f"{one:.0f}" for one in sorted(times))
            print(f"{name}: {statistics.median(times):.0f} ms in the median ({listed})", flush=True)
        if given.paint_only:
            return
        for name, told in chain(streams(url, actor, given.seconds), many_messages(url), long_answers(url, actor)):
            print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
