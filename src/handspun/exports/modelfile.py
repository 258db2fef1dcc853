"""Write a Modelfile, from which Ollama creates a model out of a GGUF file.

Ollama's templates are Go's, a chat template is Jinja. The one is derived from the other by rendering marked chats,
and kept only if it gives the same text, to the byte, for every chat of `_CHATS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from handspun.data.messages import Message
from handspun.data.rendering import render
from handspun.display import logger
from handspun.errors import TemplateError
from handspun.models.end_of_turn import eos_token_ids
from handspun.models.load import ChatModel, context_length

_MARK = "mark0mark"
_LONGEST_CONTEXT = 8192
"""Ollama reserves memory for the whole context. A longer one is left to Ollama's default."""

Chat = Sequence[tuple[str, str]]
_TURNS = [("user", " a\n"), ("assistant", "b  \n\nc"), ("user", "{{ d }}"), ("assistant", ""), ("user", "\te")]
_CHATS: list[Chat] = [
    *([*system, *_TURNS[:length]] for system in ([], [("system", " s\n")]) for length in (1, 3, 5)),
    [("user", "user"), ("assistant", "<think>\nx\n</think>\n\ny"), ("user", "assistant")],
]
"""Chats that end with the user. Their texts begin and end with space, which some templates remove."""


@dataclass(frozen=True)
class PlainTemplate:
    """What a template writes around each message, before the answer, and as the default system message."""

    around: dict[str, tuple[str, str]]
    answer: str
    system: str | None

    def render(self, chat: Chat) -> str:
        """Return the prompt, as Ollama composes it."""
        if self.system is not None and chat[0][0] != "system":
            chat = [("system", self.system), *chat]
        texts = [content.join(self.around[role]) for role, content in chat]
        return "".join(texts) + self.answer

    def in_go(self) -> str:
        """Return the template in Go's syntax."""
        branches = [
            f'{{{{ {"if" if n == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def plain_template(chat: ChatModel) -> PlainTemplate | None:
    """Return the model's template for plain chats, or None if it does more than write texts around messages."""
    try:
        found = _derive(chat)
        if found is not None and all(found.render(one) == _rendered(chat, one) for one in _CHATS):
            return found
    except TemplateError:  # a template that takes no system message, say
        pass
    return None


def _derive(chat: ChatModel) -> PlainTemplate | None:
    with_system = [("system", _MARK), ("user", _MARK), ("assistant", _MARK), ("user", _MARK)]
    long, short = _rendered(chat, with_system), _rendered(chat, with_system[:2])
    parts = long.split(_MARK)
    if len(parts) != 5 or len(short.split(_MARK)) != 3:
        return None
    answer_end = short.split(_MARK)[2]
    # What stands between two texts is the end of the one message and the start of the next. Without a generation
    # prompt, a chat ends with the end of its last message.
    user_after = _rendered(chat, with_system[:2], answer=False).split(_MARK)[2]
    assistant_after = _rendered(chat, with_system[:3], answer=False).split(_MARK)[3]
    user_before = parts[3].removeprefix(assistant_after)
    first = _rendered(chat, [("user", _MARK)], answer=False).split(_MARK)[0]
    around = {
        "system": (parts[0], parts[1].removesuffix(user_before)),
        "user": (user_before, user_after),
        "assistant": (parts[2].removeprefix(user_after), assistant_after),
    }
    system = None
    if default := first.removesuffix(user_before):  # a system message that the template adds
        system = default.removeprefix(around["system"][0]).removesuffix(around["system"][1])
    found = PlainTemplate(around, answer_end.removeprefix(user_after), system)
    pieces = [piece for pair in around.values() for piece in pair] + [found.answer, system or ""]
    return None if any("{{" in piece or '"""' in piece for piece in pieces) else found


def _rendered(chat: ChatModel, messages: Chat, *, answer: bool = True) -> str:
    given: list[Message] = [{"role": role, "content": content} for role, content in messages]
    return render(chat.tokenizer, given, None, generation_prompt=answer, variables=chat.template_args)


def modelfile(chat: ChatModel, gguf: Path) -> str:
    """Return the text of a Modelfile beside a GGUF file."""
    lines = [f"FROM ./{gguf.name}"]
    template = plain_template(chat) if chat.tokenizer.chat_template else None
    if template is None and chat.tokenizer.chat_template:
        logger.warning(
            "the Modelfile has no TEMPLATE: none that gives the same text could be derived from the chat "
            "template. Write one yourself, or use llama.cpp, which reads the chat template."
        )
    if template is not None:
        lines.append(f'TEMPLATE """{template.in_go()}"""')
        if template.system is not None:
            lines.append(f'SYSTEM """{template.system}"""')
    ids = dict.fromkeys(eos_token_ids(chat.model))
    if chat.tokenizer.chat_template:
        ids = {chat.template.end_of_turn_id: None, **ids}
    lines += [f'PARAMETER stop "{text}"' for text in chat.tokenizer.convert_ids_to_tokens(list(ids))]
    # Greedy, as `handspun generate` is; Ollama's own defaults sample and penalize repetition.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    context = context_length(chat.model.config)
    if context is not None and context <= _LONGEST_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
