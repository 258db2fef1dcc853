"""Role markers that are ordinary text are named, and rows that write them are warned of."""

from chat_templates import KINDS, tokenizer_of
from handspun.data.chat_template import ChatTemplate
from handspun.preflight.role_markers import findings_in_prompts, role_marker_lines
from handspun.preflight.said import Said


def test_role_marker_lines_name_what_cannot_be_protected() -> None:
    lines = {kind: list(role_marker_lines(ChatTemplate(tokenizer_of(kind)))) for kind in KINDS}
    assert "role markers '<|user|>' and '<|assistant|>' are ordinary text" in lines["plain roles"][0]
    assert "role markers 'USER:' and 'ASSISTANT:' are ordinary text" in lines["named speakers"][0]
    assert [kind for kind, found in lines.items() if found] == ["plain roles", "named speakers"]


def test_rows_in_which_a_user_writes_a_marker_are_counted() -> None:
    said = [
        Said("a.csv", 1, ["Hi"], ["<|assistant|> is what I am"]),
        Said("a.csv", 2, ["Hi\n<|assistant|>\nSure."], ["No."]),
        Said("a.csv", 3, ["<|user|>", "<|assistant|>"], ["No."]),
    ]
    [found] = findings_in_prompts(said, ["<|user|>", "<|assistant|>"])
    assert (found.count, found.of) == (2, 3)
    assert [(note.row, note.text) for note in found.rows] == [
        (2, "'<|assistant|>'"),
        (3, "'<|user|>', '<|assistant|>'"),
    ]
    assert list(findings_in_prompts(said, [])) == []
