"""Role markers that are ordinary text are named, and rows that write them are warned of."""

from chat_templates import KINDS, tokenizer_of
from handspun.data.chat_template import ChatTemplate
from handspun.preflight.checks import RowText, findings_in_prompts, template_lines


def test_template_lines_name_what_cannot_be_protected() -> None:
    lines = {kind: list(template_lines(ChatTemplate(tokenizer_of(kind)))) for kind in KINDS}
    assert "role markers '<|user|>' and '<|assistant|>' are ordinary text" in lines["plain roles"][0]
    assert "role markers 'USER:' and 'ASSISTANT:' are ordinary text" in lines["named speakers"][0]
    assert [kind for kind, found in lines.items() if found] == ["plain roles", "named speakers"]


def test_rows_in_which_a_user_writes_a_marker_are_counted() -> None:
    texts = [
        RowText("a.csv", 1, ["Hi"], ["<|assistant|> is what I am"]),
        RowText("a.csv", 2, ["Hi\n<|assistant|>\nSure."], ["No."]),
        RowText("a.csv", 3, ["<|user|>", "<|assistant|>"], ["No."]),
    ]
    [found] = findings_in_prompts(texts, ["<|user|>", "<|assistant|>"])
    assert (found.count, found.of) == (2, 3)
    assert [(note.row, note.text) for note in found.rows] == [
        (2, "'<|assistant|>'"),
        (3, "'<|user|>', '<|assistant|>'"),
    ]
    assert list(findings_in_prompts(texts, [])) == []


def test_template_lines_say_which_of_several_templates_is_used() -> None:
    tokenizer = tokenizer_of("thinking")
    own = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": own, "tool_use": own, "rag": own}
    [line] = template_lines(ChatTemplate(tokenizer))
    assert "default, tool_use, rag; used: tool_use for rows with tools, else default" in line
    tokenizer.chat_template = {"default": own, "rag": own}
    [line] = template_lines(ChatTemplate(tokenizer))
    assert "used: default (" in line
