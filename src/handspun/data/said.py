"""Which tokens of a prompt hold what somebody said, and which are the template's own."""

from typing import Any

from handspun.data.chat_template import ChatTemplate
from handspun.data.conversations import Message
from handspun.data.sentinels import Slot


def said_ids(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    continue_final_message: bool = False,
) -> list[int]:
    """Those ids of `template.encode_prompt` that hold any of the data, and not the template's own text alone."""
    hidden, frame = template.prompt_frame(messages, tools, continue_final_message=continue_final_message)
    text, is_said = "", list[bool]()
    for part in (part for segment in frame.segments for part in segment.parts):
        new = hidden.data_of(part)[0] if isinstance(part, Slot) else part[0]
        text += new
        is_said += [isinstance(part, Slot)] * len(new)
    ids, position = list[int](), 0
    for run in template._runs(frame.segments, lambda slot: template._data(slot, hidden)):
        position = text.index(run.text, position)  # a run may have lost the space around it
        if run.token_ids is not None:  # an added token
            places = [(run.token_ids[0], (0, len(run.text)))]
        else:
            tokenizer = template._first_run if run.first else template._later_run
            encoding = tokenizer.encode(run.text, add_special_tokens=False)
            places = list(zip(encoding.ids, encoding.offsets, strict=True))
        ids += [id for id, (start, end) in places if any(is_said[position + start : position + end])]
        position += len(run.text)
    return ids


__all__ = ["said_ids"]
