"""From messages to token ids, and to the mask of what is learned: training and prompting share this file.

A tokenizer's Jinja template mixes its own text with the data, and once rendered nobody can tell which is
which: a user who types `<|im_end|>` has ended the turn. So the data is hidden first. Every string of it is
replaced by a sentinel, the template is rendered, and each character is then known to be the template's or
the data's:

    [{"role": "user", "content": "Hi"}]  ->  <|im_start|>user\n⟨0⟩<|im_end|>\n  ->  ids

Added tokens are recognised only where the template wrote them. Each run between two of them is tokenised
whole, because BPE merges across the seams of smaller pieces.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from handspun.data.conversations import Message
from handspun.errors import TemplateError

# Private-use characters and a quote. The quote tells where the template escaped it: behind `tojson` it
# comes back as \" and the data must be escaped alike.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(r'(?:\ue000|\\ue000)(\\*)"(\d+)(?:\ue001|\\ue001)')

# Words of JSON Schema that templates branch on (`if param.type == "string"`), so they must stay readable.
_SCHEMA_WORDS = {"string", "number", "integer", "boolean", "object", "array", "null", "function"}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, and for each whether it is learned. note: what the template left out."""

    input_ids: list[int]
    learned: list[bool]
    note: str | None = None


@dataclass(frozen=True)
class _Piece:
    """A stretch of rendered text and whose it is."""

    text: str
    owner: str  # "template", "data" or "assistant"


@dataclass(frozen=True)
class _Hidden:
    """One hidden string: its text, whose it is, and what a template that leaves it out has left out."""

    text: str
    owner: str
    what: str


class ChatTemplate:
    """A tokenizer's chat template, made safe and able to say what is learned.

    Raises TemplateError if the tokenizer has no template, or one that does not end the assistant's turn
    with an added token (a model could never learn to stop).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise TemplateError(
                "this tokenizer has no chat template, so conversations cannot be rendered for it. Use a chat "
                "model's tokenizer, put a chat_template.jinja into the model folder, or prompt it with plain "
                "text (--no-chat)."
            )
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (it has no `tokenizers` backend). Convert "
                "it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        added = list(tokenizer.added_tokens_decoder.items())
        self._added = {token.content: (id, token) for id, token in added if token.content}
        self._any_added = _alternatives(self._added)
        self._non_special = _alternatives([text for text, (_, token) in self._added.items() if not token.special])
        self._first_run, self._later_run = _without_added_tokens(tokenizer.backend_tokenizer)
        self._markers = self._find_markers()
        self.end_of_turn_id = self._find_end_of_turn()
        self.end_of_turn: str = tokenizer.added_tokens_decoder[self.end_of_turn_id].content

    def encode(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Encoded]:
        """Training examples of a conversation: in every assistant turn, what the model has to say is learned,
        from the end of the generation prompt to the end-of-turn token.

        One example, or several where the template renders a turn differently once it is history (a think
        block that is later left out): each such turn is then learned as it was generated.
        """
        hidden = _Sentinels(self._markers, self._any_added)
        messages, tools = hidden.conversation(messages, tools)
        full = self._render(messages, tools)
        self._nothing_left_out(full, hidden, messages)
        together: list[tuple[int, int]] = []
        alone: list[tuple[str, tuple[int, int]]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise TemplateError("it begins with an assistant turn, which no prompt comes before.")
            head = self._render(messages[:i], tools, generation_prompt=True)
            turn = self._render(messages[: i + 1], tools)
            if not turn.startswith(head):
                raise TemplateError(
                    f"the template renders assistant turn {i + 1} so that it does not begin with the generation "
                    "prompt: what is trained would never be what is prompted."
                )
            if full.startswith(turn):
                together.append((len(head), len(turn)))
            else:
                alone.append((turn, (len(head), len(turn))))
        texts = [(full, together)] if together else []
        texts += [(turn, [span]) for turn, span in alone]
        note = hidden.reasoning_left_out(text for text, _ in texts)
        return [self._tokenize(text, hidden, spans, note) for text, spans in texts]

    def encode_prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of the conversation and the generation prompt: a prefix of the ids that `encode` trains."""
        hidden = _Sentinels(self._markers, self._any_added)
        messages, tools = hidden.conversation(messages, tools)
        text = self._render(messages, tools, generation_prompt=True)
        self._nothing_left_out(text, hidden, messages)
        return self._tokenize(text, hidden, []).input_ids

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=cast("Any", tools), add_generation_prompt=generation_prompt, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = " ".join(message["role"] for message in messages) or "no messages"
            raise TemplateError(f"the chat template refuses this conversation ({roles}): {error}") from error
        assert isinstance(text, str)
        return text

    def _tokenize(
        self, rendered: str, hidden: "_Sentinels", spans: list[tuple[int, int]], note: str | None = None
    ) -> Encoded:
        """Rendered text with sentinels, and the learned spans in it, to ids and mask."""
        starts = [_revealed_length(hidden, rendered[:start]) for start, _ in spans]
        ends = [_revealed_length(hidden, rendered[:end]) for _, end in spans]
        text, matches = "", []
        for piece in hidden.reveal(rendered):
            if piece.owner != "data":
                pattern = self._any_added if piece.owner == "template" else self._non_special
                matches += [(len(text) + m.start(), len(text) + m.end()) for m in pattern.finditer(piece.text)]
            text += piece.text
        stops = [self._turn_end(text, matches, start, end) for start, end in zip(starts, ends, strict=True)]

        input_ids: list[int] = []
        learned: list[bool] = []

        def add(ids: list[int], at: int) -> None:
            input_ids.extend(ids)
            is_learned = any(start <= at < stop for start, stop in zip(starts, stops, strict=True))
            learned.extend([is_learned] * len(ids))

        position, strip_next = 0, False
        for start, end, added in _cuts(text, matches, starts):
            run = text[position:start]
            token = self._added[text[start:end]][1] if added else None
            if strip_next:
                run = run.lstrip()
            if token is not None and token.lstrip:
                run = run.rstrip()
            if run:
                add(self._encode_run(run, first=not input_ids), position)
            if token is not None:
                add([self._added[token.content][0]], start)
            strip_next = token is not None and token.rstrip
            position = end
        return Encoded(input_ids, learned, note)

    def _encode_run(self, run: str, *, first: bool) -> list[int]:
        ids: list[int] = (self._first_run if first else self._later_run).encode(run, add_special_tokens=False).ids
        return ids

    def _turn_end(self, text: str, matches: list[tuple[int, int]], start: int, end: int) -> int:
        """Where the turn that was rendered to text[start:end] has its end-of-turn token's end."""
        ends = [e for s, e in matches if start <= s and e <= end and text[s:e] == self.end_of_turn]
        if not ends:
            raise TemplateError(f"the template ends an assistant turn without {self.end_of_turn!r}.")
        return ends[-1]

    def _nothing_left_out(self, rendered: str, hidden: "_Sentinels", messages: list[Message]) -> None:
        """A template may not lose data silently, but for an earlier turn's thinking."""
        shown = {int(match[2]) for match in _SENTINEL.finditer(rendered)}
        for what in ("the tools", "the tool calls"):  # a template may show a part of a schema
            indices = {i for i, value in enumerate(hidden.values) if value.what == what}
            if indices and not indices & shown:
                raise TemplateError(
                    f"the chat template leaves out {what}: it was not made for tools. Use a model whose template "
                    "shows them."
                )
        for i, value in enumerate(hidden.values):
            if i not in shown and value.what.endswith("message"):
                roles = " ".join(message["role"] for message in messages)
                raise TemplateError(f"the chat template leaves out {value.what} of this conversation ({roles}).")

    def _find_markers(self) -> re.Pattern[str]:
        """Strings like `</think>` that the template looks for in what the assistant said. They stay readable
        there, so that the template treats them as it does without sentinels."""
        source = self.tokenizer.chat_template
        source = "\n".join(source.values()) if isinstance(source, dict) else source
        found = set(re.findall(r"""['"](?:\\n)*(</?\w+>)(?:\\n)*['"]""", source))
        return _alternatives([m for m in found if m not in self._added or not self._added[m][1].special])

    def _find_end_of_turn(self) -> int:
        hidden = _Sentinels(self._markers, self._any_added)
        probe, _ = hidden.conversation(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], None
        )
        rendered = self._render(probe, None)
        after = rendered[max(match.end() for match in _SENTINEL.finditer(rendered)) :] if rendered else ""
        match = self._any_added.search(after)
        if match is None:
            raise TemplateError(
                f"the chat template ends the assistant's turn with {after!r}, which holds none of the "
                "tokenizer's added tokens: a model trained with it would not learn to stop. Use a template that "
                "ends the turn with one (ChatML's is <|im_end|>)."
            )
        end_of_turn_id: int = self._added[match[0]][0]
        return end_of_turn_id


class _Sentinels:
    """The data of one conversation, each string behind its sentinel."""

    def __init__(self, markers: re.Pattern[str], any_added: re.Pattern[str]) -> None:
        self.values: list[_Hidden] = []
        self._markers, self._any_added = markers, any_added

    def conversation(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """The same conversation with all its data hidden."""
        hidden = [self._message(message) for message in messages]
        return hidden, [self._json(tool, "the tools") for tool in tools] if tools else None

    def _message(self, message: Message) -> Message:
        role = message["role"]
        if role == "assistant":
            pieces = self._markers.split(message.get("content") or "")
            marks = [*self._markers.findall(message.get("content") or ""), ""]
            content = "".join(
                self._hide(piece, "assistant", "an assistant's text") + mark
                for piece, mark in zip(pieces, marks, strict=True)
            )
        else:
            content = self._hide(message.get("content") or "", "data", f"the {role} message")
        hidden: Message = {"role": role, "content": content}
        if message.get("reasoning_content"):
            hidden["reasoning_content"] = self._hide(message["reasoning_content"], "assistant", "the reasoning")
        if message.get("tool_calls"):
            hidden["tool_calls"] = [self._tool_call(call) for call in message["tool_calls"]]
        for key in ("name", "tool_call_id"):
            if message.get(key):
                hidden[key] = self._hide(message[key], "data", "a name")
        return hidden

    def _tool_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        hidden = {
            "name": self._hide(function["name"], "data", "the tool calls"),
            "arguments": self._json(
                json.loads(arguments) if isinstance(arguments, str) else arguments, "arguments"
            ),
        }
        kept = {key: self._json(value, "a tool call's id") for key, value in call.items() if key == "id"}
        return {**kept, "type": "function", "function": hidden}

    def _json(self, value: Any, what: str) -> Any:
        if isinstance(value, str):
            return value if value in _SCHEMA_WORDS else self._hide(value, "data", what)
        if isinstance(value, dict):
            # Templates look keys up by name, so a key is hidden only if it could forge something.
            return {
                self._hide(key, "data", what) if self._could_forge(key) else key: self._json(item, what)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._json(item, what) for item in value]
        return value

    def _could_forge(self, key: str) -> bool:
        return bool(self._any_added.search(key)) or _OPEN in key or _CLOSE in key

    def reasoning_left_out(self, rendered: Iterable[str]) -> str | None:
        """What to tell of reasoning that none of the texts shows."""
        shown = {int(match[2]) for text in rendered for match in _SENTINEL.finditer(text)}
        lost = [i for i, value in enumerate(self.values) if value.what == "the reasoning" and i not in shown]
        return "the template leaves out the reasoning of an assistant turn" if lost else None

    def _hide(self, text: str, owner: str, what: str) -> str:
        """White space at both ends stays, so that a template that trims its contents trims these."""
        core = text.strip()
        if not core:
            return text
        self.values.append(_Hidden(core, owner, what))
        start = text.index(core)
        return f'{text[:start]}{_OPEN}"{len(self.values) - 1}{_CLOSE}{text[start + len(core) :]}'

    def reveal(self, rendered: str) -> Iterator[_Piece]:
        """The rendered text in pieces, with the data in the place of its sentinels."""
        position = 0
        for match in _SENTINEL.finditer(rendered):
            if match.start() > position:
                yield _Piece(rendered[position : match.start()], "template")
            value = self.values[int(match[2])]
            text = value.text
            for _ in range((len(match[1]) + 1).bit_length() - 1):  # 1 backslash: in JSON, 3: in JSON in JSON
                text = json.dumps(text, ensure_ascii=match[0].startswith("\\"))[1:-1]
            yield _Piece(text, value.owner)
            position = match.end()
        if position < len(rendered):
            yield _Piece(rendered[position:], "template")


def _revealed_length(hidden: _Sentinels, rendered: str) -> int:
    return sum(len(piece.text) for piece in hidden.reveal(rendered))


def _cuts(text: str, matches: list[tuple[int, int]], starts: list[int]) -> list[tuple[int, int, bool]]:
    """(start, end, is an added token) in order: added tokens, learned starts, and the end of the text."""
    cuts = [(start, end, True) for start, end in matches]
    cuts += [(start, start, False) for start in starts]
    return [*sorted(cuts, key=lambda cut: (cut[0], cut[1])), (len(text), len(text), False)]


def _alternatives(texts: Any) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; with no texts, nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _without_added_tokens(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """The same tokenizer knowing no added token: for the first run of a text, and for later ones (where a
    Metaspace pre-tokenizer with prepend_scheme "first" writes no space)."""
    first, later = Tokenizer(backend.model), Tokenizer(backend.model)
    for plain in (first, later):
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
    metaspace = backend.pre_tokenizer
    if isinstance(metaspace, pre_tokenizers.Metaspace) and metaspace.prepend_scheme == "first":
        later.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=metaspace.replacement, prepend_scheme="never", split=metaspace.split
        )
    return first, later
