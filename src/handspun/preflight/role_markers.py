"""Role markers that are ordinary text, as in Zephyr's and Vicuna's templates: the data's own look the same."""

from collections.abc import Iterator, Sequence

from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import RowNote
from handspun.preflight.findings import Finding, finding
from handspun.preflight.said import Said


def template_lines(template: ChatTemplate) -> Iterator[str]:
    """Say which of several templates is used, and that one cannot be protected from what only looks like turns."""
    named = template.tokenizer.chat_template
    if isinstance(named, dict):
        for_tools = "tool_use for rows with tools, else default" if "tool_use" in named else "default"
        yield f"chat templates of the tokenizer: {', '.join(named)}; used: {for_tools} (--chat-template chooses)"
    if template.plain_markers:
        names = " and ".join(map(repr, template.plain_markers))
        yield f"role markers {names} are ordinary text in this chat template:"
        yield "  a user who types them begins what looks like a turn (docs/data.md, Role markers)"


def findings_in_prompts(said: Sequence[Said], markers: Sequence[str]) -> Iterator[Finding]:
    """Rows in which a user or a tool writes such a marker."""
    notes = []
    for one in said:
        text = "\n".join(one.prompts)
        if found := [marker for marker in markers if marker in text]:
            notes.append(RowNote(one.file, one.row, ", ".join(map(repr, found))))
    yield from finding(
        "rows in which a user or a tool writes a role marker of the template",
        "take it out, or use a template whose markers are added tokens: to the model it begins a turn",
        notes,
        of=len(said),
    )


__all__ = ["findings_in_prompts", "template_lines"]
