"""handspun chat: its commands, what it remembers, and how it shows text."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from handspun.cli.views.chat import HELP, Chat, WordWrap
from handspun.config import GenerationOptions
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer


def talk(
    monkeypatch: pytest.MonkeyPatch, lines: str, chat: ChatModel | None = None, **options: Any
) -> tuple[Chat, str]:
    """The conversation after these lines, and what was printed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    printed = io.StringIO()
    model = chat or ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")
    loop = Chat(model, GenerationOptions(**{"max_new_tokens": 4, **options}), Console(file=printed, width=200))
    loop.loop()
    return loop, printed.getvalue()


def said(chat: Chat, role: str) -> list[str]:
    return [message["content"] for message in chat.messages if message["role"] == role]


def test_a_line_that_ends_with_a_backslash_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = talk(monkeypatch, "one\\\ntwo\\\n\nthree\n")
    assert said(chat, "user") == ["one\ntwo", "three"]


def test_lines_from_a_pipe_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = talk(monkeypatch, "one\\\ntwo\n")
    assert said(chat, "user") == ["one\ntwo"]
    assert capsys.readouterr().out == ""


def test_control_c_at_the_prompt_says_how_to_exit(
    monkeypatch: pytest.MonkeyPatch, tiny_chat: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been meant for an answer that has just ended."""

    class Keyboard(io.StringIO):
        presses = 2

        def isatty(self) -> bool:
            return True

        def readline(self, *size: Any) -> Any:
            if self.presses:
                self.presses -= 1
                raise KeyboardInterrupt
            return super().readline(*size)

    monkeypatch.setattr("sys.stdin", Keyboard("one\n"))
    screen = io.StringIO()
    chat = Chat(tiny_chat, GenerationOptions(max_new_tokens=1), Console(file=screen, width=80))
    chat.loop()
    assert said(chat, "user") == ["one"]
    assert screen.getvalue().count("Ctrl-D or /quit exits.") == 2
    assert "you: " in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_speed_is_shown_after_an_answer_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_chat: ChatModel
) -> None:
    """By this clock each token takes a quarter of a second. The first, which waits for the prompt, is left out."""
    printed: list[str] = []
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        console = Console(file=screen, width=80, color_system=None)
        options = GenerationOptions(max_new_tokens=4, min_new_tokens=4)
        Chat(tiny_chat, options, console, clock=partial(next, (n / 4 for n in range(100)))).loop()
        printed.append(screen.getvalue())
    assert "[4 tokens, 4.0 tokens/s]" in printed[0]
    assert "tokens/s" not in printed[1]


def test_notes_are_broken_between_words(monkeypatch: pytest.MonkeyPatch, tiny_chat: ChatModel) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/retry\none\n/retry\n"))
    screen = Terminal()
    Chat(tiny_chat, GenerationOptions(max_new_tokens=1), Console(file=screen, width=80, color_system=None)).loop()
    assert HELP in screen.getvalue()
    assert "Add --temperature 0.7, for \nexample." in screen.getvalue()


def test_reset_forgets_and_quit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = talk(monkeypatch, "one\n/reset\ntwo\n/quit\nthree\n")
    assert said(chat, "user") == ["two"]


def test_retry_replaces_the_last_answer_by_another_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 8}
    once, _ = talk(monkeypatch, "one\n", **options)
    again, _ = talk(monkeypatch, "one\n/retry\n", **options)
    third, _ = talk(monkeypatch, "one\n/retry\n/retry\n", **options)
    answers = [said(chat, "assistant") for chat in (once, again, third)]
    assert [len(found) for found in answers] == [1, 1, 1]
    assert len({found[0] for found in answers}) == 3
    # The next message begins with the given seed again.
    assert talk(monkeypatch, "one\n/retry\n/reset\none\n", **options)[0].messages == once.messages


def test_retry_says_that_greedy_decoding_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, printed = talk(monkeypatch, "/retry\none\n/retry\n")
    assert "there is no message to answer again" in printed
    assert "the options do not sample: the answer is the same" in printed
    assert said(chat, "user") == ["one"]


def test_system_sets_the_system_message_of_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, "/system Be brief.\none\n")[0].system_prompt == "Be brief."
    assert talk(monkeypatch, "/system Be brief.\n/system\none\n")[0].system_prompt is None


def test_save_appends_a_row_that_train_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    lines = f"/save {file}\n/system Be brief.\nHi 你好\n/save chat.csv\n/save {file}\n"
    chat, printed = talk(monkeypatch, f"{lines}/save {tmp_path / 'no' / 'a.jsonl'}\n")
    assert "there is nothing to save" in printed
    assert "name a .jsonl file" in printed
    assert "cannot be written: No such file or directory" in printed
    [row] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert row == {"messages": [{"role": "system", "content": "Be brief."}, *chat.messages]}
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


@pytest.fixture
def small() -> ChatModel:
    """A model whose context holds two or three short turns."""
    return ChatModel(tiny_model("qwen2", max_position_embeddings=100), tiny_tokenizer(), "tiny")


def test_a_full_context_drops_the_oldest_turns_and_says_so(
    monkeypatch: pytest.MonkeyPatch, small: ChatModel
) -> None:
    chat, printed = talk(monkeypatch, "first\nsecond one\nthird\nfourth\n", small)
    assert "the model's context of 100 tokens is full: the oldest turn is forgotten" in printed
    assert said(chat, "user")[-1] == "fourth"
    assert "first" not in said(chat, "user")
    assert len(said(chat, "user")) == len(said(chat, "assistant"))


def test_a_message_that_cannot_be_answered_is_reported_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, small: ChatModel
) -> None:
    chat, printed = talk(monkeypatch, f"{'too long ' * 100}\nHi\n", small)
    assert said(chat, "user") == ["Hi"]
    assert "100 tokens" in printed


def test_an_unknown_command_is_answered_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is no command."""
    chat, printed = talk(monkeypatch, "/rest\n/etc/hosts\n/help\n")
    assert "there is no command /rest." in printed
    assert printed.count("/reset          start over") == 2
    assert said(chat, "user") == ["/etc/hosts"]


def wrapped(width: int | None, *pieces: str) -> str:
    wrap = WordWrap(width)
    return "".join([*map(wrap.push, pieces), wrap.finish()])


def test_word_wrap_breaks_between_words_whatever_the_pieces() -> None:
    assert wrapped(10, "one two three four") == "one two \nthree four"
    assert wrapped(10, "one tw", "o th", "ree f", "our") == "one two \nthree four"
    assert wrapped(5, "ab\ncd efg h") == "ab\ncd \nefg h"
    assert wrapped(6, "你好你好") == "你好你\n好"
    assert wrapped(4, "abcdefgh ij") == "abcdefgh\nij"  # a word that is longer than the window
    assert wrapped(None, "one two") == "one two"


@given(st.text(alphabet="ab \n你", max_size=60), st.integers(2, 12), st.integers(1, 5))
def test_word_wrap_keeps_the_text_and_the_width(text: str, width: int, size: int) -> None:
    shown = wrapped(width, *(text[start : start + size] for start in range(0, len(text), size)))
    assert shown.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    too_wide = [line for line in shown.split("\n") if cell_len(line.rstrip(" ")) > width]
    assert all(" " not in line.strip(" ") for line in too_wide)
