"""Pictures of the chat page, with a real model behind it.

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
QUESTION = "Write a Python function that tells whether a number is prime, and explain it in one sentence."
SHORT = "Give me three tips for baking bread, as a list."


@contextmanager
def serving(models: list[str]) -> Iterator[str]:
    """Run `handspun serve`, and yield the page's address once it is ready."""
    given = [option for model in models for option in ("--model", model)]
    command = [sys.executable, "-m", "handspun", "serve", "--port", "0", "--weights", "int8", *given]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in process.stderr if line.startswith("ready: "))
            yield re.findall(r"http://\S+", ready)[-1]
        finally:
            process.terminate()
            process.stderr.read()


def ask(tab: Chromium, text: str, **options: str) -> None:
    """Ask with the most probable tokens, so that the pictures come out the same."""
    for name, value in {"temperature": "0", "max_tokens": "160", **options}.items():
        fill(tab, name, value)
    say(tab, text)
    last_answer(tab, seconds=120)
    tab.run("document.activeElement.blur()")


def chat(tab: Chromium) -> None:
    """A conversation of two turns."""
    ask(tab, SHORT)
    ask(tab, QUESTION)


def explain(tab: Chromium) -> None:
    """A word of a drawn answer, and how it was chosen."""
    ask(tab, "Name a fruit, and say why you like it.", temperature="0.9", top_k="20", seed="4", max_tokens="40")
    tab.click(".assistant [title^='Why these']")
    tab.run("document.querySelectorAll('.token')[4].click()")
    tab.until("document.querySelector('.why table')")


def correct(tab: Chromium) -> None:
    """An answer while it is corrected."""
    ask(tab, "What is the capital of Australia?", max_tokens="40")
    tab.press("c", code="KeyC", modifiers=1)
    tab.run("box = document.activeElement, box.value = 'Canberra.', box.blur()")


PICTURES: dict[str, tuple[Callable[[Chromium], None], int, int, str]] = {
    "chat-desk": (chat, 1280, 800, "light"),
    "chat-phone": (chat, 390, 780, "dark"),
    "chat-explain": (explain, 1280, 900, "dark"),
    "chat-correct": (correct, 1280, 500, "light"),
}
"""By file: what is shown, width, height, and color scheme."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base", help="a second model, for answers side by side")
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=[*PICTURES], action="append")
    given = parser.parse_args()
    with serving([given.model] + ([given.base] if given.base else [])) as url:
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
