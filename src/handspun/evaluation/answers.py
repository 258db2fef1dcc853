"""Answer the prompts of rows greedily and compare with the rows' outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from handspun.config import GenerationOptions
from handspun.data.conversations import to_conversation
from handspun.data.messages import Message
from handspun.data.rows import Row
from handspun.decoding.generate import stream
from handspun.decoding.options import resolve
from handspun.decoding.results import GenerationResult
from handspun.decoding.text import StreamingText, vocabulary
from handspun.display import logger
from handspun.models.load import ChatModel

_END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Question:
    """A row's conversation up to its last answer, that answer, and whether the row needs tools.

    Rows that need tools are not evaluated, nor is plain text, which has no messages before it.

    trained: the text that training on this row teaches, including the think block and anything else that the
    template writes around the answer. trained_tokens: its number of tokens.
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
        """The last user message."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def question_of(
    row: Row,
    formats: Mapping[str, str],
    *,
    system_prompt: str | None,
    role_map: Mapping[str, str] | None = None,
    chat: ChatModel | None = None,
) -> Question:
    """Return the question of a row that training would not drop.

    Args:
        row: The row.
        formats: Format of each file, by name.
        system_prompt: System message for conversations without one.
        role_map: Additional spellings of roles.
        chat: The model, to fill in `trained` and `trained_tokens`.
    """
    conversation = to_conversation(row, formats[row.file], system_prompt=system_prompt, role_map=role_map)
    *asked, last = conversation.messages
    needs_tools = bool(conversation.tools or last.get("tool_calls"))
    question = Question(row.file, row.number, asked, str(last["content"]), needs_tools)
    if chat is None or needs_tools or not asked:
        return question
    ids = trained_answer_ids(chat, conversation.messages)
    return replace(question, trained=text_of_answer(chat, ids), trained_tokens=len(ids))


def trained_answer_ids(chat: ChatModel, messages: Sequence[Message]) -> list[int]:
    """Return the target token ids of a conversation's last answer, its end of turn included."""
    unmarked = cast("list[Message]", [{key: m[key] for key in m if key != "train"} for m in messages])
    example = chat.template.encode(unmarked)[0]  # the one with the whole conversation
    start = len(chat.template.encode_prompt(unmarked[:-1]))
    end = len(example.loss_mask) - example.loss_mask[::-1].index(True)
    return example.input_ids[start:end]


def text_of_answer(chat: ChatModel, ids: Sequence[int]) -> str:
    """Return the text that `generate` returns for an answer of these tokens, without the final end of turn."""
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
    should_stop: Callable[[], bool] | None = None,
    on_answer: Callable[[int], None] | None = None,
) -> list[GenerationResult]:
    """Return one greedy answer per question. A stop string that occurs in an expected answer is not used.

    Args:
        chat: The model.
        questions: Questions to answer.
        system_prompt: System message for conversations without one.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Number of answers decoded together.
        should_stop: Called before every step. Once it returns True, unfinished answers end as "cancelled".
        on_answer: Called with the number of complete answers whenever one is.
    """
    stop_strings = resolve(GenerationOptions(), chat, chat=True)[0].stop_strings
    harmless = tuple(s for s in stop_strings if not any(s in (question.trained or "") for question in questions))
    if too_long := sum(question.trained_tokens > max_new_tokens for question in questions):
        logger.warning(
            f"{too_long} of {len(questions)} rows expect more than {max_new_tokens} tokens and cannot match: "
            "raise --max-new-tokens"
        )
    results: list[GenerationResult] = []
    for chunk in stream(
        chat,
        [question.messages for question in questions],
        options=GenerationOptions(
            do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, stop_strings=harmless
        ),
        system_prompt=system_prompt,
        batch_size=batch_size,
        should_stop=should_stop,
    ):
        if chunk.result is not None:
            results.append(chunk.result)
            if on_answer is not None:
                on_answer(len(results))
    return sorted(results, key=lambda result: result.prompt_index)


def is_right(question: Question, answer: str) -> bool:
    """Return whether an answer matches the row's output, or the text that training on the row teaches."""
    expected = {question.expected, question.trained or question.expected}
    return any(is_exact_match(answer, text) for text in expected)


def is_exact_match(answer: str, expected: str) -> bool:
    """Return whether two answers are equal, ignoring differences in white space.

    Any white space counts as one space, and none at the ends. Case and punctuation count. Text before </think> is
    ignored, unless the expected answer has it too.
    """
    if _END_OF_THINKING in answer and _END_OF_THINKING not in expected:
        answer = answer.rpartition(_END_OF_THINKING)[2]
    return answer.split() == expected.split()
