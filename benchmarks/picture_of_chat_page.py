"""Pictures of the chat page, with real models behind it: the demo's, before and after its fine-tuning.

    handspun demo
    PYTHONPATH=src:tests/helpers python benchmarks/picture_of_chat_page.py --folder docs/images

Each picture is one function below. Chromium's headless shell takes them (Debian: chromium-headless-shell).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from chat_page import fill, last_answer, say
from chromium import Chromium

MOST_BYTES = 150_000
BASE, TUNED = "smollm2-135m", "tuned"
QUESTION = "Write a Python function that returns the sum of a list of numbers, and explain it in one sentence."


@contextmanager
def serving(models: dict[str, str]) -> Iterator[str]:
    """Run `handspun serve`, and yield the page's address once it is ready."""
    given = [option for name, model in models.items() for option in ("--model", f"{name}={model}")]
    more = ["--port", "0", "--no-log-requests", "--threads", "1"]
    command = [sys.executable, "-m", "handspun", "serve", *more, *given]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in process.stderr if line.startswith("ready: "))
            yield re.findall(r"http://\S+", ready)[-1]
        finally:
            process.terminate()
            process.stderr.read()


def ask(tab: Chromium, text: str, model: str = BASE, **options: str) -> None:
    """Ask with the most probable tokens, so that the pictures come out the same."""
    fill(tab, "model", model)
    for name, value in {"temperature": "0", "max_tokens": "120", "seed": "1", **options}.items():
        fill(tab, name, value)
    say(tab, text)
    last_answer(tab, seconds=300)
    tab.run("document.activeElement.blur()")


def chat(tab: Chromium) -> None:
    """A list, and code."""
    ask(tab, "Which three things do plants need? Answer with a list.")
    ask(tab, QUESTION)


def explain(tab: Chromium) -> None:
    """A word of a drawn answer, and how it was chosen."""
    ask(tab, "Name a fruit, and say why you like it.", temperature="0.9", top_k="20", seed="4", max_tokens="24")
    tab.click(".assistant [title^='Why these']")
    tab.run("document.querySelectorAll('.token')[4].click()")
    tab.until("document.querySelector('.why table') !== null")
    tab.run("document.querySelector('#scroller').scrollTop = 0")


def correct(tab: Chromium) -> None:
    """An answer while it is corrected."""
    ask(tab, "Which animal is the largest?", max_tokens="40")
    tab.press("c", code="KeyC", modifiers=1)
    tab.run("box = document.activeElement, box.value = 'The blue whale.', box.blur()")


def beams(tab: Chromium) -> None:
    """The tree of a beam search."""
    ask(tab, "Name a city in Italy.", num_beams="4", max_tokens="16")
    tab.run("document.querySelector('#scroller').scrollTop = 1e6")


def compare(tab: Chromium) -> None:
    """Answers before and after the fine-tuning, token by token."""
    fill(tab, "model", TUNED)
    fill(tab, "compare", BASE)
    ask(tab, "Are you a human being?", TUNED, max_tokens="32")
    tab.click(".pair button[title^='Compare tokens']")
    tab.until("document.querySelector('.pair.compared .tokens') !== null", seconds=60)
    tab.run("document.querySelectorAll('.pair .token')[3].focus()")
    tab.run("document.querySelector('#scroller').scrollTop = 0")


PICTURES: dict[str, tuple[Callable[[Chromium], None], int, int, str]] = {
    "chat-desk": (chat, 1280, 760, "light"),
    "chat-phone": (chat, 390, 760, "dark"),
    "chat-explain": (explain, 1280, 900, "dark"),
    "chat-correct": (correct, 1280, 480, "light"),
    "chat-tree": (beams, 1280, 760, "light"),
    "chat-compare": (compare, 1280, 700, "light"),
}
"""By file: what is shown, width, height, and color scheme."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tuned", default="output/demo")
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=[*PICTURES], action="append")
    given = parser.parse_args()
    with serving({BASE: given.base, TUNED: given.tuned}) as url:
        for name in given.only or PICTURES:
            take, width, height, scheme = PICTURES[name]
            file = given.folder / f"{name}.png"
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                with Chromium(Path(folder) / "profile") as tab:
                    tab.look(width=width, height=height, scheme=scheme)
                    tab.open(url)
                    take(tab)
                    tab.screenshot(Path(folder) / "shot.png")
                Image.open(Path(folder) / "shot.png").convert("RGB").quantize(64).save(file, optimize=True)
            size = file.stat().st_size
            print(f"{file}: {size:,} bytes")
            assert size < MOST_BYTES, f"{file} is too large for the documents"


if __name__ == "__main__":
    main()
