"""Turn messages into token ids and a loss mask. Training and prompting share this file.

A tokenizer's Jinja template mixes its own text with the data. Once rendered, the two look the same: a user who
types `<|im_end|>` has ended the turn. So placeholders hide the data first (`placeholders.py`), and then the
template is rendered. Each character is then known to come from the template or from the data:

    [{"role": "user", "content": "Hi"}]  ->  <|im_start|>user
⟨0⟩<|im_end|>
  ->  ids

Added tokens are recognized only where the template wrote them. Each span between two of them is tokenized
as one piece, because BPE would merge across the edges of smaller pieces.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer, pre_tokenizers

from handspun.data.messages import Message
from handspun.data.placeholders import (
    SENTINEL,
    Placeholder,
    Placeholders,
    alternatives,
    cut_at_sentinels,
    end_of_content,
)
from handspun.data.rendering import check_template_args, render
from handspun.data.text_loss import TextLoss
from handspun.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHAPES_REMEMBERED = 1000
_MAX_REPEATS = 100
"""How often a template may repeat one text of a message. Repeating a long text would take gigabytes."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids and loss mask of one example.

    note: what the template left out. is_cut: the example had more text, which was not tokenized.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    note: str | None = None
    is_cut: bool = False


class Span(NamedTuple):
    """A part of an example that is tokenized as one piece."""

    text: str
    loss_mask: bool
    token_ids: list[int] | None = None
    """Ids that are known already: an added token's, or those of the template's own text."""
    first: bool = False
    """True if the example begins with this span. Some tokenizers put a space before the first text."""


@dataclass(frozen=True)
class TurnText:
    """Rendered text between two edges of trained turns: template text with its added tokens, and placeholders."""

    parts: Sequence[tuple[str, list[tuple[int, int]]] | Placeholder]
    is_turn: bool
    is_begun: bool = False
    """True for a turn that the model will continue. It is split where training splits turns, and it has no end."""


@dataclass(frozen=True)
class Frame:
    """One example of a conversation shape: its segments, and its spans if no data contains an added token."""

    segments: list[TurnText]
    spans: list[tuple[Span, list[str | Placeholder]]]
    """Spans that are not tokenized yet come with their parts, because their text contains placeholders."""


@dataclass(frozen=True)
class Rendering:
    """The template's output for all conversations of one shape: a frame per example, and a note for the report."""

    frames: list[Frame]
    note: str | None = None


@dataclass(frozen=True)
class Layout:
    """An example whose text is not tokenized yet."""

    spans: list[Span]
    note: str | None = None
    is_cut: bool = False


class ChatTemplate:
    """A tokenizer's chat template that keeps data apart from markup and produces the loss mask.

    Raises TemplateError if the tokenizer has no template, or if the template does not end the assistant's turn
    with an added token. A model could not learn to stop with such a template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_args: Mapping[str, Any] | None = None
    ) -> None:
        """Check and probe the template. template_args: more variables that it reads, such as enable_thinking."""
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        if not tokenizer.chat_template:
            raise TemplateError(
                "this tokenizer has no chat template, so conversations cannot be rendered for it. Use a chat "
                "model's tokenizer, pass a template (--chat-template FILE), put a chat_template.jinja into the "
                "model folder, or prompt with plain text (--no-chat)."
            )
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (it has no `tokenizers` backend). Convert "
                "it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        added = list(tokenizer.added_tokens_decoder.items())
        self._added = {token.content: (id, token) for id, token in added if token.content}
        self._any_added = alternatives(self._added)
        self._first_tokenizer, self._later_tokenizer = _without_added_tokens(tokenizer.backend_tokenizer)
        self.text_loss = TextLoss(tokenizer.backend_tokenizer, tokenizer.unk_token_id)
        self._rendered: dict[str, Rendering] = {}
        source = tokenizer.chat_template
        if isinstance(source, dict) and "default" not in source:
            raise TemplateError(
                "this tokenizer has several chat templates, and none of them is the default. Choose one: "
                f"--chat-template with one of {', '.join(source)}."
            )
        check_template_args(source, self.template_args)
        source = "\n".join(source.values()) if isinstance(source, dict) else source
        self.end_of_turn_id, of_turns = self._find_tokens_of_turns()
        writable = {text for text, (_, token) in self._added.items() if not token.special and text not in of_turns}
        self._writable_tokens = alternatives(writable)
        self._markers = self._find_markers(source, writable)
        self.end_of_turn: str = tokenizer.added_tokens_decoder[self.end_of_turn_id].content
        self.plain_markers = self._find_plain_markers()
        self._any_turn_marker = alternatives([*of_turns, *self.plain_markers])

    def encode(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[TokenizedExample]:
        """Return the training examples of a conversation: `lay_out`, then `tokenize`."""
        return self.tokenize(self.lay_out(messages, tools))

    def lay_out(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Layout]:
        """Return the training examples of a conversation, not yet tokenized.

        Each assistant turn is trained on, from the end of the generation prompt through the end-of-turn token. A
        message whose `train` is False is context: none of its tokens is trained on, not even its end-of-turn
        token.

        There are several examples if the template renders a turn differently once it is history, such as a think
        block that it drops later. Each such turn is then trained on as the model would generate it.
        """
        hidden = Placeholders(self._markers, self._any_added)
        messages, tools = hidden.conversation(messages, tools)
        rendering = self._render_shape(self._render_examples, hidden, messages, tools)
        return [Layout(self._filled(frame, hidden), rendering.note) for frame in rendering.frames]

    def encode_prompt(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the ids of the conversation and the generation prompt: a prefix of the ids that `encode` returns.

        continue_final_message: end inside the last message, an assistant's, so that the model continues it. There
        is no generation prompt then.
        """
        hidden, frame = self.prompt_frame(messages, tools, continue_final_message=continue_final_message)
        return self.tokenize([Layout(self._filled(frame, hidden))])[0].input_ids

    def prompt_frame(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, continue_final_message: bool = False
    ) -> tuple[Placeholders, Frame]:
        """Return the placeholders of a prompt and its frame."""
        hidden = Placeholders(self._markers, self._any_added)
        messages, tools = hidden.conversation(messages, tools)
        make = self._render_continued if continue_final_message else self._render_prompt
        [frame] = self._render_shape(make, hidden, messages, tools).frames
        return hidden, frame

    def _render_shape(
        self,
        make: Callable[[Placeholders, list[Message], list[dict[str, Any]] | None], Rendering],
        hidden: Placeholders,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
    ) -> Rendering:
        """Return the rendering of a conversation's shape, from the cache if the shape occurred before."""
        # With the data hidden, a conversation is only a shape, and most rows of a data set share a few shapes.
        shape = f"{make.__name__} {messages} {tools}"
        if shape not in self._rendered:
            if len(self._rendered) == _SHAPES_REMEMBERED:
                self._rendered.clear()
            self._rendered[shape] = make(hidden, messages, tools)
        return self._rendered[shape]

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = False
    ) -> str:
        return render(
            self.tokenizer, messages, tools, generation_prompt=generation_prompt, variables=self.template_args
        )

    def _render_prompt(
        self, hidden: Placeholders, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> Rendering:
        messages, _ = _without_marks(messages)
        text = self._render(messages, tools, generation_prompt=True)
        self._check_no_content_lost(text, hidden, messages)
        return Rendering([self._frame(text, [])])

    def _render_continued(
        self, hidden: Placeholders, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> Rendering:
        """Render the conversation up to the last character of its last message."""
        messages, _ = _without_marks(messages)
        full = self._render(messages, tools)
        self._check_no_content_lost(full, hidden, messages)
        end = end_of_content(full, messages[-1]["content"])
        if end is None:
            raise TemplateError(
                "the chat template leaves out the start of the answer, so the answer cannot be continued. Remove "
                "the start, or use another template."
            )
        head = self._render(messages[:-1], tools, generation_prompt=True)
        begins = len(head) if full.startswith(head) and len(head) <= end else end
        return Rendering([self._frame(full[:end], [(begins, end)], is_begun=True)])

    def _render_examples(
        self, hidden: Placeholders, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> Rendering:
        messages, context = _without_marks(messages)
        full = self._render(messages, tools)
        self._check_no_content_lost(full, hidden, messages)
        together: list[tuple[int, int]] = []
        alone: list[tuple[str, tuple[int, int]]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i in context:
                continue
            if i == 0:
                raise TemplateError("the conversation begins with an assistant turn, so that turn has no prompt.")
            head = self._render(messages[:i], tools, generation_prompt=True)
            turn = self._render(messages[: i + 1], tools)
            if not turn.startswith(head):
                raise TemplateError(
                    f"the template does not begin assistant turn {i + 1} with the generation prompt, so training "
                    "would never match prompting."
                )
            if full.startswith(turn):
                together.append((len(head), len(turn)))
            else:
                alone.append((turn, (len(head), len(turn))))
        texts = [(full, together)] if together else []
        texts += [(turn, [span]) for turn, span in alone]
        note = hidden.reasoning_left_out(text for text, _ in texts)
        return Rendering([self._frame(text, spans) for text, spans in texts], note)

    def _frame(self, rendered: str, turns: list[tuple[int, int]], *, is_begun: bool = False) -> Frame:
        """Split the rendered text of a shape into spans, and tokenize the spans that contain no placeholder."""
        # Once per shape is enough. A placeholder stands for text that neither begins nor ends with white space, so
        # data does not move the edges of spans unless it contains an added token. Such a row is split by itself
        # (`_filled`).
        times = Counter(match[2] for match in SENTINEL.finditer(rendered)).most_common(1)
        if times and times[0][1] > _MAX_REPEATS:
            raise TemplateError(
                f"the chat template writes the same text of a message {times[0][1]:,} times. Use another template."
            )
        segments = self._segments(rendered, turns, is_begun=is_begun)
        spans = self._spans(segments, lambda slot: (slot.sentinel, []))
        of_template = [span for span in spans if span.token_ids is None and not SENTINEL.search(span.text)]
        ids = self._ids_of(of_template)
        spans = [
            span._replace(token_ids=ids[span.text, span.first]) if span in of_template else span for span in spans
        ]
        return Frame(segments, [(span, _parts(span)) for span in _joined_where_known(spans)])

    def _filled(self, frame: Frame, hidden: Placeholders) -> list[Span]:
        """Return the spans of a frame with the data filled in."""
        spans: list[Span] = []
        for span, parts in frame.spans:
            if not parts:
                spans.append(span)
                continue
            text = ""
            for part in parts:
                if isinstance(part, Placeholder):
                    new, added = self._data(part, hidden)
                    if added:
                        return self._spans(frame.segments, lambda slot: self._data(slot, hidden))
                    text += new
                else:
                    text += part
            spans.append(Span(text, span.loss_mask, None, span.first))
        return spans

    def _data(self, slot: Placeholder, hidden: Placeholders) -> tuple[str, list[tuple[int, int]]]:
        """Return a placeholder's text, and the positions of the added tokens that it may contain."""
        text, owner = hidden.data_of(slot)
        return text, [] if owner == "data" else _matches(self._writable_tokens, text)

    def _segments(self, rendered: str, turns: list[tuple[int, int]], *, is_begun: bool) -> list[TurnText]:
        """Split rendered text with placeholders where the trained turns begin and end."""
        edges = sorted({0, len(rendered), *(edge for turn in turns for edge in turn)})
        return [
            TurnText(
                [
                    part if isinstance(part, Placeholder) else (part, _matches(self._any_added, part))
                    for part in cut_at_sentinels(rendered[start:end])
                ],
                is_turn=(start, end) in turns and not is_begun,
                is_begun=(start, end) in turns and is_begun,
            )
            for start, end in pairwise(edges)
        ]

    def _spans(
        self, segments: Sequence[TurnText], data_of: Callable[[Placeholder], tuple[str, list[tuple[int, int]]]]
    ) -> list[Span]:
        """Fill the data into the segments and split them at added tokens and where a trained turn begins."""
        text = ""
        cuts: list[tuple[int, int, bool]] = []  # start, end, whether it is an added token
        edges: list[int] = []  # start of each trained turn, and the end of its end-of-turn token
        for segment in segments:
            start, first = len(text), len(cuts)
            if segment.is_turn or segment.is_begun:
                cuts.append((start, start, False))
            for part in segment.parts:
                new, added = data_of(part) if isinstance(part, Placeholder) else part
                cuts += [(len(text) + begin, len(text) + end, True) for begin, end in added]
                text += new
            if segment.is_turn:
                edges += [start, self._turn_end(text, cuts[first:])]
        return self._split_into_spans(text, cuts, edges)

    def _split_into_spans(self, text: str, cuts: list[tuple[int, int, bool]], edges: list[int]) -> list[Span]:
        spans: list[Span] = []

        def add(piece: str, at: int, token_id: int | None = None) -> None:
            is_target = bisect_right(edges, at) % 2 == 1
            spans.append(Span(piece, is_target, None if token_id is None else [token_id], first=not spans))

        position, strip_next = 0, False
        for start, end, is_added in [*cuts, (len(text), len(text), False)]:
            piece = text[position:start]
            token_id, token = self._added[text[start:end]] if is_added else (None, None)
            if strip_next:
                piece = piece.lstrip()
            if token is not None and token.lstrip:
                piece = piece.rstrip()
            if piece:
                add(piece, position)
            if token is not None:
                add(token.content, start, token_id)
            strip_next = token is not None and token.rstrip
            position = end
        return spans

    def tokenize(self, layouts: Sequence[Layout]) -> list[TokenizedExample]:
        """Tokenize many examples at once.

        Text that several examples share, such as a system prompt, is tokenized once. The `tokenizers` library uses
        all cores.
        """
        ids = self._ids_of(span for layout in layouts for span in layout.spans if span.token_ids is None)
        return [_joined(layout, ids) for layout in layouts]

    def _ids_of(self, spans: Iterable[Span]) -> dict[tuple[str, bool], list[int]]:
        ids: dict[tuple[str, bool], list[int]] = {(span.text, span.first): [] for span in spans}
        for tokenizer, first in ((self._first_tokenizer, True), (self._later_tokenizer, False)):
            texts = [text for text, is_first in ids if is_first == first]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids.update(((text, first), found.ids) for text, found in zip(texts, encodings, strict=True))
        return ids

    def _turn_end(self, text: str, cuts: list[tuple[int, int, bool]]) -> int:
        """Return the end of a turn's end-of-turn token. cuts: the turn's own."""
        ends = [end for start, end, _ in cuts if text[start:end] == self.end_of_turn]
        if not ends:
            raise TemplateError(f"the template ends an assistant turn without {self.end_of_turn!r}.")
        return ends[-1]

    def _check_no_content_lost(self, rendered: str, hidden: Placeholders, messages: list[Message]) -> None:
        """Raise TemplateError if the template dropped data. It may drop only the thinking of earlier turns."""
        shown = {int(match[2]) for match in SENTINEL.finditer(rendered)}
        for what in ("the tools", "the tool calls"):  # a template may show only part of a schema
            indices = {i for i, value in enumerate(hidden.values) if value.what == what}
            if indices and not indices & shown:
                raise TemplateError(
                    f"the chat template leaves out {what}: it does not support tools. Use a model whose template "
                    "supports them."
                )
        for i, value in enumerate(hidden.values):
            if i not in shown and value.what.endswith("message"):
                roles = " ".join(message["role"] for message in messages)
                raise TemplateError(f"the chat template leaves out {value.what} of this conversation ({roles}).")

    def _find_markers(self, source: str, writable: set[str]) -> re.Pattern[str]:
        """Return a pattern of the strings that the template looks for in an assistant's text (`</think>`)."""
        # Placeholders leave these strings in place, so that the template treats them as usual.
        found = set(re.findall(r"""['"](?:\\n)*(</?\w+>)(?:\\n)*['"]""", source))
        return alternatives([marker for marker in found if marker not in self._added or marker in writable])

    def turn_markers_in(self, text: str) -> list[str]:
        """Return the turn markers in a text: strings that the template writes around turns."""
        return list(dict.fromkeys(self._any_turn_marker.findall(text)))

    def _find_plain_markers(self) -> list[str]:
        """Return the plain texts that begin a user's and an assistant's turn, if these are no added tokens."""
        # The same text in the data cannot be told from the template's.
        hidden = Placeholders(alternatives([]), self._any_added)
        turns = [("user", "question"), ("assistant", "answer"), ("user", "another")]
        probe, _ = hidden.conversation([{"role": role, "content": text} for role, text in turns], None)
        try:
            rendered = self._render(probe, None, generation_prompt=True)
        except TemplateError:
            return []
        found = [match.span() for match in SENTINEL.finditer(rendered)]
        if len(found) != len(turns):
            return []
        before_user, before_assistant = rendered[found[1][1] : found[2][0]], rendered[found[2][1] :]
        markers = [text.replace(self.end_of_turn, "").strip() for text in (before_user, before_assistant)]
        return [text for text in dict.fromkeys(markers) if text and not self._any_added.search(text)]

    def _find_tokens_of_turns(self) -> tuple[int, set[str]]:
        """Return the id of the end-of-turn token, and all added tokens around turns."""
        # Data that contains one of these tokens, special or not, would forge a turn.
        hidden = Placeholders(alternatives([]), self._any_added)
        probe, _ = hidden.conversation(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], None
        )
        rendered = self._render(probe, None)
        after = rendered[max(match.end() for match in SENTINEL.finditer(rendered)) :] if rendered else ""
        match = self._any_added.search(after)
        if match is None:
            raise TemplateError(
                f"the chat template ends the assistant's turn with {after!r}, which contains none of the "
                "tokenizer's added tokens: a model trained with it would not learn to stop. Use a template that "
                "ends the turn with one (ChatML's is <|im_end|>)."
            )
        end_of_turn_id: int = self._added[match[0]][0]
        around_a_question = self._render(probe[:1], None)
        return end_of_turn_id, {match[0], *self._any_added.findall(around_a_question)}


def _without_marks(messages: list[Message]) -> tuple[list[Message], set[int]]:
    """Return the messages without their `train` keys, and the indices of messages that are context only."""
    context = {i for i, message in enumerate(messages) if message.get("train") is False}
    return [{key: m[key] for key in m if key != "train"} for m in messages], context


def _matches(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text)]


def _parts(span: Span) -> list[str | Placeholder]:
    return list(cut_at_sentinels(span.text)) if span.token_ids is None else []


def _joined_where_known(spans: list[Span]) -> Iterator[Span]:
    """Merge neighboring spans whose ids are known and whose loss mask is the same."""
    for (is_known, loss_mask), some in groupby(spans, lambda span: (span.token_ids is not None, span.loss_mask)):
        if is_known:
            together = list(some)
            ids = [id for span in together for id in span.token_ids or []]
            yield Span("".join(span.text for span in together), loss_mask, ids, together[0].first)
        else:
            yield from some


def _joined(layout: Layout, ids: dict[tuple[str, bool], list[int]]) -> TokenizedExample:
    """Build ids and loss mask together, span by span."""
    input_ids: list[int] = []
    loss_mask: list[bool] = []
    for span in layout.spans:
        new = ids[span.text, span.first] if span.token_ids is None else span.token_ids
        input_ids += new
        loss_mask += [span.loss_mask] * len(new)
    return TokenizedExample(input_ids, loss_mask, layout.note, layout.is_cut)


def _without_added_tokens(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Return two tokenizers without added tokens: one for the first span of a text, and one for later spans."""
    first, later = Tokenizer(backend.model), Tokenizer(backend.model)
    for plain in (first, later):
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
    # With prepend_scheme "first", Metaspace writes a space before the first span only.
    metaspace = backend.pre_tokenizer
    if isinstance(metaspace, pre_tokenizers.Metaspace) and metaspace.prepend_scheme == "first":
        later.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=metaspace.replacement, prepend_scheme="never", split=metaspace.split
        )
    return first, later


class TracedPrompt(NamedTuple):
    """A prompt's text and token ids, and who wrote each token: TEMPLATE, or the role of the message that has it.

    A token that both wrote counts as the message's. The definitions of tools count as "tool".
    """

    text: str
    token_ids: list[int]
    writers: list[str]

    @property
    def is_content(self) -> list[bool]:
        """For each token, whether any of it comes from the messages or tools."""
        return [writer != TEMPLATE for writer in self.writers]


TEMPLATE = "template"
"""The writer of text that comes from no message."""


def content_token_ids(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    continue_final_message: bool = False,
) -> list[int]:
    """Return the token ids of a prompt that come from the user's content. Arguments: as of `trace_prompt`."""
    traced = trace_prompt(template, messages, tools, continue_final_message=continue_final_message)
    return [id for id, is_content in zip(traced.token_ids, traced.is_content, strict=True) if is_content]


def trace_prompt(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    continue_final_message: bool = False,
) -> TracedPrompt:
    """Return a prompt, and who wrote each of its tokens: the template, or whose message it is.

    Args:
        template: renders and tokenizes the prompt.
        messages: the prompt's messages.
        tools: tools as JSON schemas.
        continue_final_message: as for `ChatTemplate.encode_prompt`.
    """
    hidden, frame = template.prompt_frame(messages, tools, continue_final_message=continue_final_message)
    text, writer_at = "", list[str]()
    for part in (part for segment in frame.segments for part in segment.parts):
        if isinstance(part, Placeholder):
            new, writer = hidden.data_of(part)[0], hidden.values[part.number].writer
        else:
            new, writer = part[0], TEMPLATE
        text += new
        writer_at += [writer] * len(new)
    ids, writers, position = list[int](), list[str](), 0
    for span in template._spans(frame.segments, lambda slot: template._data(slot, hidden)):
        position = text.index(span.text, position)  # a span may have lost the space around it
        if span.token_ids is not None:  # an added token
            offsets = [(span.token_ids[0], (0, len(span.text)))]
        else:
            tokenizer = template._first_tokenizer if span.first else template._later_tokenizer
            encoding = tokenizer.encode(span.text, add_special_tokens=False)
            offsets = list(zip(encoding.ids, encoding.offsets, strict=True))
        ids += [id for id, _ in offsets]
        for _, (start, end) in offsets:
            own = [writer for writer in writer_at[position + start : position + end] if writer != TEMPLATE]
            writers.append(own[0] if own else TEMPLATE)
        position += len(span.text)
    return TracedPrompt(text, ids, writers)
