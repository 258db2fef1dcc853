"""Texts that stand in place of what should be there: placeholders, fields that nothing was put in, refusals."""

import re
from collections.abc import Callable, Iterator, Sequence

from handspun.config import NEXT_USER
from handspun.data.examples import RowNote
from handspun.data.naming import shown
from handspun.preflight.findings import Finding, finding
from handspun.preflight.said import Said

_PLACEHOLDERS = {
    *("noinput", "nooutput", "noresponse", "noanswer", "n/a", "none", "nan", "null", "nil", "undefined"),
    *("todo", "tbd", "fixme", "placeholder", "...", "…", "......", "……", "-", "--", "---", "?", "???"),
    *("无", "暂无", "无输入", "无输出", "空", "待补充", "略"),
}
_AROUND = "<>[](){}\"'`*\\. 。"

# Code has {{name}} in its templates and {name} in its texts. A field is one that stands in prose, by itself.
_FIELD = re.compile(
    r"(?<![\w{$\\}%(=\"'`])(?:\{\{ ?[A-Za-z_][\w .-]{0,40}? ?\}\}|\{[A-Za-z_]\w{2,40}\})(?![\w{}(=\"'`])"
)
_CODE = re.compile(
    r"```|<[a-zA-Z/!]|\{%|[;{]\s*$|\)\s*[{:]\s*$|^\s*(?:import|from|def|class|return|var|let|const|function)\b"
    r"|\bf[\"']|\.format\(|\\\w+\{|=>",
    re.MULTILINE,
)

_CANNOT = r"(?:can't|cannot|can not|won't|will not|unable|not able|not allowed)(?: be able)?(?: to)?"
_WHAT = (
    r"(?:assist|help|provide|answer|fulfil|fulfill|comply|complete|create|generate|support|engage|discuss|respond|"
    r"do (?:that|this|so)|offer|give|share|write|draw|play|perform|access|browse|open|view|process|recommend)\b"
)
_AI = r"an? (?:ai|artificial intelligence|(?:large )?language model)\b"
# What one cannot do counts: "I'm sorry, but I cannot attend" is no refusal but a letter.
_REFUSAL = re.compile(
    rf"\bas {_AI}(?: language)?(?: model| assistant)?,? i\b"
    rf"|\bi(?:'m| am)(?: just| only)? {_AI}.{{0,60}}\b(?:{_CANNOT}|don't|do not)\b"
    r"|^(?:(?:i'm |i am |i )?(?:very |so )?(?:sorry|afraid|apologi[sz]e)\b.{0,30}\b)?"
    rf"i(?:'m| am)? ?{_CANNOT} {_WHAT}"
    r"|(?:抱歉|对不起|很遗憾).{0,12}(?:无法|不能).{0,4}(?:提供|回答|协助|帮|满足|完成|讨论|生成|给出|写|访问|执行|继续)"
    r"|^我(?:无法|不能).{0,4}(?:提供|回答|协助|帮|满足|完成|讨论|生成|给出|访问)"
    r"|作为(?:一个|一名|一款)?(?:人工智能|ai|大?语言模型)",
    re.IGNORECASE,
)
_BEGINNING = 200
"""Characters: an answer that refuses begins with it."""


def findings_in_answers(said: Sequence[Said]) -> Iterator[Finding]:
    """Of the rows of one set."""
    yield from _those(
        said,
        placeholder_answer,
        "answers that are a placeholder",
        "write their answers, or delete the rows: the model learns to say just this",
    )
    yield from _those(
        said,
        placeholder_prompt,
        "prompts that end in a placeholder",
        "empty these inputs: the model will expect such words where there is no input",
    )
    yield from _those(
        said,
        unfilled_field,
        "answers with a field that nothing was put in",
        "fill the fields in, or delete the rows",
    )
    yield from _those(
        said,
        refusal,
        "answers that read like a refusal",
        "read some of them, and delete those in which nothing should be refused",
    )
    yield from _those(
        said,
        next_user,
        'answers with a line "User:", which is a stop string of chats',
        "give --no-stop-strings to generate and chat, which would cut such answers there; eval --generate does",
    )


def next_user(said: Said) -> str | None:
    """Return the line of an answer at which decoding would cut it."""
    lines = (answer.partition(NEXT_USER)[1:] for answer in said.answers)
    return next((f"{stop.strip()}{rest}".split("\n")[0] for stop, rest in lines if stop), None)


def placeholder_answer(said: Said) -> str | None:
    """The placeholder that one of the answers is."""
    return next((answer for answer in said.answers if _is_placeholder(answer)), None)


def placeholder_prompt(said: Said) -> str | None:
    """The placeholder that a prompt is, or that its last line is: an input that is none."""
    lasts = (prompt.rstrip().rpartition("\n")[2] for prompt in said.prompts)
    return next((last for last in lasts if _is_placeholder(last)), None)


def unfilled_field(said: Said) -> str | None:
    """A field such as {{name}} in an answer that is no code."""
    fields = ((_FIELD.search(answer), answer) for answer in said.answers if "{" in answer)
    return next((field[0] for field, answer in fields if field and not _CODE.search(answer)), None)


def refusal(said: Said) -> str | None:
    """The words of one of the answers that begins with a refusal."""
    beginnings = (answer[:_BEGINNING].replace("’", "'").strip() for answer in said.answers)
    refusals = (_REFUSAL.search(beginning) for beginning in beginnings)
    return next((found[0] for found in refusals if found), None)


def _is_placeholder(text: str) -> bool:
    bare = text.strip().casefold()
    if len(bare) > 30:
        return False
    return "".join(bare.split()) in _PLACEHOLDERS or "".join(bare.strip(_AROUND).split()) in _PLACEHOLDERS


def _those(
    said: Sequence[Said], found_in: Callable[[Said], str | None], what: str, remedy: str
) -> Iterator[Finding]:
    notes = [RowNote(one.file, one.row, shown(found)) for one in said if (found := found_in(one)) is not None]
    yield from finding(what, remedy, notes, of=len(said))
