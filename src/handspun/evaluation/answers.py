"""Greedy answers to what rows ask, held against what the rows answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from handspun.config import GenerationOptions
from handspun.data.conversations import Message, to_conversation
from handspun.data.rows import Row
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.evaluation.instructions import IDS, Instruction, read_instructions
from handspun.models.load import ChatModel


@dataclass(frozen=True)
class Question:
    """What a row asks: the conversation up to its last answer, that answer (None if the row has none), the
    instructions that it carries, and whether it needs tools, which are not evaluated."""

    file: str
    row: int
    messages: list[Message]
    expected: str | None
    instructions: tuple[Instruction, ...]
    needs_tools: bool = False

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def only_asks(row: Row) -> bool:
    """Whether a row has a prompt with instructions and no answer, as IFEval's rows do."""
    return isinstance(row.values.get("prompt"), str) and IDS in row.values and "completion" not in row.values


def question_of(
    row: Row,
    formats: Mapping[str, str],
    *,
    system_prompt: str | None,
    role_map: Mapping[str, str] | None = None,
) -> Question:
    """What a row asks that training would not drop. formats: of each file."""
    instructions = read_instructions(row)
    if only_asks(row):
        messages: list[Message] = [{"role": "user", "content": row.values["prompt"]}]
        return Question(row.file, row.number, messages, None, instructions)
    conversation = to_conversation(row, formats[row.file], system_prompt=system_prompt, role_map=role_map)
    *asked, last = conversation.messages
    needs_tools = bool(conversation.tools or last.get("tool_calls"))
    return Question(row.file, row.number, asked, str(last["content"]), instructions, needs_tools)


def greedy_answers(
    chat: ChatModel,
    questions: Sequence[Question],
    *,
    system_prompt: str | None,
    max_new_tokens: int,
    batch_size: int,
    notice: Callable[[str], None],
) -> list[GenerationResult]:
    """One answer to each question."""
    return generate(
        chat,
        [question.messages for question in questions],
        options=GenerationOptions(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens),
        system_prompt=system_prompt,
        batch_size=batch_size,
        notice=notice,
    )


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether the two are the same but for white space: each run of it counts as one space, at the ends as none.
    Case and punctuation count."""
    return answer.split() == expected.split()
