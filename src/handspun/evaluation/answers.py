"""Greedy answers to what rows ask, held against what the rows answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from handspun.config import GenerationOptions
from handspun.data.conversations import to_conversation
from handspun.data.messages import Message
from handspun.data.rows import Row
from handspun.decoding.generate import generate
from handspun.decoding.options import resolve
from handspun.decoding.results import GenerationResult
from handspun.decoding.text import StreamingText, vocabulary
from handspun.models.load import ChatModel

_END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Question:
    """What a row asks: the conversation up to its last answer, that answer, and whether it needs tools.

    Rows that need tools are not evaluated.

    trained: what a model says that has learned the row to the last token, think block and all that the template
    writes around the answer included; trained_tokens: how many tokens that takes.
    """

    file: str
    row: int
    messages: list[Message]
    expected: str
    needs_tools: bool = False
    trained: str | None = None
    trained_tokens: int = 0

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def question_of(
    row: Row,
    formats: Mapping[str, str],
    *,
    system_prompt: str | None,
    role_map: Mapping[str, str] | None = None,
    chat: ChatModel | None = None,
) -> Question:
    """What a row asks that training would not drop. formats: of each file. chat: to say what would be learned."""
    conversation = to_conversation(row, formats[row.file], system_prompt=system_prompt, role_map=role_map)
    *asked, last = conversation.messages
    needs_tools = bool(conversation.tools or last.get("tool_calls"))
    question = Question(row.file, row.number, asked, str(last["content"]), needs_tools)
    if chat is None or needs_tools:
        return question
    ids = trained_answer_ids(chat, conversation.messages)
    return replace(question, trained=text_of_answer(chat, ids), trained_tokens=len(ids))


def trained_answer_ids(chat: ChatModel, messages: Sequence[Message]) -> list[int]:
    """Return the token ids that are learned of a conversation's last answer, its end of turn included."""
    unmarked = cast("list[Message]", [{key: m[key] for key in m if key != "train"} for m in messages])
    example = chat.template.encode(unmarked)[0]  # the one with the whole conversation
    start = len(chat.template.encode_prompt(unmarked[:-1]))
    end = len(example.loss_mask) - example.loss_mask[::-1].index(True)
    return example.input_ids[start:end]


def text_of_answer(chat: ChatModel, ids: Sequence[int]) -> str:
    """Return the text that `generate` gives for an answer of these tokens: without the end of turn at its end."""
    text = StreamingText.start(vocabulary(chat.tokenizer), ())
    for id in ids[:-1] if ids and ids[-1] == chat.template.end_of_turn_id else ids:
        text.push(id)
    text.finish()
    return text.text


def greedy_answers(
    chat: ChatModel,
    questions: Sequence[Question],
    *,
    system_prompt: str | None,
    max_new_tokens: int,
    batch_size: int,
    notice: Callable[[str], None],
) -> list[GenerationResult]:
    """One answer to each question. A stop string that a right answer holds does not end answers."""
    stop_strings = resolve(GenerationOptions(), chat, chat=True)[0].stop_strings
    harmless = tuple(s for s in stop_strings if not any(s in (question.trained or "") for question in questions))
    if too_long := sum(question.trained_tokens > max_new_tokens for question in questions):
        notice(
            f"{too_long} of {len(questions)} rows have an answer of more than {max_new_tokens} tokens, which no "
            "answer can match: raise --max-new-tokens"
        )
    return generate(
        chat,
        [question.messages for question in questions],
        options=GenerationOptions(
            do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, stop_strings=harmless
        ),
        system_prompt=system_prompt,
        batch_size=batch_size,
        notice=notice,
    )


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether the two are the same but for white space: each run of it counts as one space, at the ends as none.
    Case and punctuation count. What an answer thinks before </think> does not, unless the expected one has it."""
    if _END_OF_THINKING in answer and _END_OF_THINKING not in expected:
        answer = answer.rpartition(_END_OF_THINKING)[2]
    return answer.split() == expected.split()
