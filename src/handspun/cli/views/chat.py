"""A conversation on a terminal: lines in, streamed answers out, and commands that begin with a slash."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console

from handspun.config import GenerationOptions
from handspun.data.messages import Message
from handspun.decoding.generate import stream
from handspun.decoding.options import resolve
from handspun.decoding.prompts import context_length
from handspun.display import count_of, is_terminal, write_text
from handspun.errors import DataError, HandspunError
from handspun.models.load import ChatModel

HELP = """\
/retry          answer the last message again (another sample, if it samples)
/system TEXT    set the system message; without TEXT, the template's default
/save FILE      append the conversation to a .jsonl file, as a row to train on
/reset          start over
/quit           exit (or Ctrl-D)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""
_LEAST_ROOM = 64
"""Tokens that are kept free for an answer, if the conversation has turns that can be dropped."""


@dataclass
class Chat:
    """A conversation with a model, and where it is shown."""

    model: ChatModel
    options: GenerationOptions
    console: Console
    system_prompt: str | None = None
    messages: list[Message] = field(default_factory=list)
    retries: int = 0
    clock: Callable[[], float] = time.perf_counter

    def loop(self) -> None:
        """Read messages and commands, and answer, until /quit or the end of the input."""
        self.console.print(f"{self.model.name}. /help shows the commands, /quit exits.", markup=False)
        _use_line_editing()
        while (line := self._read()) is not None:
            name, _, argument = line.partition(" ")
            if name == "/quit":
                return
            if name in self._commands:
                self._commands[name](argument.strip())
            elif name.startswith("/") and "/" not in name[1:]:
                self._note(f"there is no command {name}.\n{HELP}")
            elif line:
                self.retries = 0
                self._answer({"role": "user", "content": line})

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": lambda _: self._note(HELP),
            "/reset": lambda _: self.messages.clear(),
            "/retry": lambda _: self._retry(),
            "/save": self._save,
            "/system": self._set_system_prompt,
        }

    def _read(self) -> str | None:
        """Return a message or command; None at the end of the input."""
        lines = []
        is_typed = is_terminal(sys.stdin)
        prompt = "you: " if is_typed else ""  # a pipe's output is answers
        try:
            # Not the console's own input: line editing has to know the prompt to draw a long line again.
            while (line := input(prompt)).endswith("\\"):
                lines.append(line.removesuffix("\\"))
                prompt = "...: " if is_typed else ""
        except KeyboardInterrupt:
            if not is_typed:
                return None
            self.console.print()
            self._note("Ctrl-D or /quit exits.")  # the key may have been meant for an answer that has just ended
            return ""
        except EOFError:
            if is_typed:
                self.console.print()
            return None
        except UnicodeDecodeError as error:
            raise DataError(f"standard input cannot be read: {error}") from error
        return "\n".join([*lines, line]).strip()

    def _answer(self, message: Message) -> None:
        """Answer a message, and remember both. A message that cannot be answered is reported and forgotten."""
        messages = [*self.messages, message]
        try:
            messages = self._fitting(messages)
            answer = self._stream(messages)
        except HandspunError as error:
            self._note(str(error))
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[Message]) -> str:
        seed = resolve(self.options, self.model, chat=True)[0].seed
        options = replace(self.options, seed=seed + self.retries if isinstance(seed, int) else seed)
        answer, wrap = "", WordWrap(self.console.width if is_terminal(self.console.file) else None)
        tokens: list[int] = []
        times: list[float] = []
        try:
            for chunk in stream(self.model, [messages], options=options, system_prompt=self.system_prompt):
                if chunk.return_index == 0:  # a conversation continues from one answer
                    answer += chunk.text
                    tokens.append(len(chunk.token_ids))
                    times.append(self.clock())
                    write_text(self.console, wrap.push(chunk.text), end="")
            write_text(self.console, wrap.finish())
            self._show_speed(tokens, times)
        except KeyboardInterrupt:
            write_text(self.console, wrap.finish(), end="")
            self.console.print(" (stopped)", style="dim")
        return answer

    def _show_speed(self, tokens: list[int], times: list[float]) -> None:
        """Print an answer's tokens per second on a terminal. tokens, times: number and time of each addition."""
        later = sum(tokens[1:])  # the first addition also waits for the prompt
        if later and times[-1] > times[0] and is_terminal(self.console.file):
            rate = later / (times[-1] - times[0])
            self._note(f"[{count_of(sum(tokens), 'token')}, {rate:.1f} tokens/s]")

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """Return the messages without the oldest turns if these leave no room for an answer, and say so."""
        context, dropped = context_length(self.model), 0
        while context is not None and len(messages) > 1 and self._tokens(messages) > context - _LEAST_ROOM:
            messages = messages[2:]
            dropped += 1
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self._note(f"the model's context of {context} tokens is full: the oldest {turns} forgotten")
        return messages

    def _tokens(self, messages: list[Message]) -> int:
        whole = [*([{"role": "system", "content": self.system_prompt}] if self.system_prompt else []), *messages]
        return len(self.model.template.encode_prompt(whole))

    def _retry(self) -> None:
        if not self.messages:
            self._note("there is no message to answer again.")
            return
        self.retries += 1
        if not resolve(self.options, self.model, chat=True)[0].do_sample:
            self._note("the options do not sample: the answer is the same. Add --temperature 0.7, for example.")
        message, self.messages = self.messages[-2], self.messages[:-2]
        self._answer(message)

    def _set_system_prompt(self, text: str) -> None:
        self.system_prompt = text or None

    def _save(self, name: str) -> None:
        if not self.messages:
            self._note("there is nothing to save.")
            return
        if not name.endswith(".jsonl"):
            self._note("name a .jsonl file, as in /save chat.jsonl.")
            return
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._note(f"{name} cannot be written: {error.strerror}.")
            return
        self._note(f"saved in {name}")

    def _note(self, text: str) -> None:
        wraps = not is_terminal(self.console.file)  # a terminal itself would break lines within words
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=wraps)


class WordWrap:
    """Breaks text between words, as it comes in. width: columns of the window; None leaves the text as it is."""

    def __init__(self, width: int | None) -> None:
        self._width, self._column, self._word = width, 0, ""

    def push(self, text: str) -> str:
        """Return the text to print now. The last word waits for its end."""
        if self._width is None:
            return text
        return "".join(map(self._add, text))

    def finish(self) -> str:
        """Return the word that waits."""
        word, self._word = self._word, ""
        return self._place(word)

    def _add(self, character: str) -> str:
        if character == "\n":
            placed, self._column = self.finish() + "\n", 0
            return placed
        if character == " ":
            return self.finish() + self._place(" ")
        if cell_len(character) > 1:  # a line may end before any character of Chinese or Japanese
            return self.finish() + self._place(character)
        self._word += character
        return ""

    def _place(self, word: str) -> str:
        """Return the word, in a new line if this one has no room for it."""
        cells, breaks = cell_len(word), ""
        if self._column and self._column + cells > (self._width or cells):
            breaks, self._column = "\n", 0
            word = word.lstrip(" ")
        self._column += cell_len(word)
        return breaks + word


def _use_line_editing() -> None:
    """Let `input` edit lines and recall earlier ones, where the system has readline."""
    if is_terminal(sys.stdout):
        with suppress(ImportError):  # Windows' own console edits lines
            import readline  # noqa: F401
