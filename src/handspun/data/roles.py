"""The names that data sets have for the roles of a chat, and what to do about one that is not known."""

import json
from collections.abc import Mapping
from typing import Any

from handspun.config.role_map import ROLES, normalize_role
from handspun.data.naming import shown, type_name

CALL = "call"
"""The role of a turn that is a tool call by itself, as LLaMA-Factory writes them; it becomes an assistant's."""

# Lower case, with `_` for spaces and hyphens. A name is here only if it means the same everywhere: `agent`,
# `customer` or `speaker_1` may be either side, so a role map has to say which.
_NAMES = {
    "system": "system developer sys system_prompt system_message systemmessage",
    "user": "user human prompter human_user end_user usermessage humanmessage user_message human_message",
    "assistant": (
        "assistant ai bot chatbot chat_bot model llm gpt chatgpt gpt3 gpt4 gpt_3 gpt_3.5 gpt_3.5_turbo gpt_4 "
        "gpt_4o bing bard claude gemini copilot ai_assistant aimessage ai_message aimessagechunk assistant_message"
    ),
    "tool": (
        "tool function observation tool_response function_response tool_result function_result tool_output "
        "ipython toolmessage functionmessage"
    ),
    CALL: "function_call tool_call",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}

ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "type")
"""Keys that say whose a turn is; the first that is there counts."""

UNKNOWN_ROLE = "the unknown role"
"""How the reason begins of a row that was dropped because of a role."""


def known_role(name: str, role_map: Mapping[str, str]) -> str | None:
    """Return the role that a name stands for, its case and the space around it aside; None if it is not known.

    The role map comes first, so that it can also turn a known name into another role.
    """
    key = normalize_role(name)
    return role_map.get(key) or _ROLES.get(key)


def role_name(turn: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return (key, value) of what says whose the turn is; (None, None) if nothing does."""
    for key in ROLE_KEYS:
        value = turn.get(key)
        if isinstance(value, dict):  # ChatGPT's export: {"author": {"role": "user"}}
            value = value.get("role", value.get("name"))
        if value is not None:
            return key, value
    return None, None


def role_of(turn: Mapping[str, Any], role_map: Mapping[str, str]) -> tuple[str | None, str]:
    """Return (role, "") of a turn, or (None, the reason why it has none)."""
    key, value = role_name(turn)
    if key is None:
        return None, "a message without a role"
    if isinstance(value, list | dict) or value != value:
        return None, f"a role that is {type_name(value)}"
    # Speakers may be numbers, which a role map can name too.
    name = value if isinstance(value, str) else json.dumps(value, default=str)
    role = known_role(name, role_map)
    if role is None:
        return None, f"{UNKNOWN_ROLE} '{shown(name)}'"
    others = {known_role(other, role_map) for k in ROLE_KEYS[:-1] if isinstance(other := turn.get(k), str)}
    if key != "type" and others - {None, role}:
        return None, "a message with two roles"
    return role, ""


def role_advice() -> str:
    """Return what to do about roles that are not known, in a sentence for the account of the rows."""
    return (
        f"known roles, in any case: {known_roles()}. Map another one with --role-map NAME=ROLE, as in --role-map "
        "agent=assistant"
    )


def known_roles() -> str:
    """Return the names of all roles that are known, for a message."""
    return "; ".join(f"{role} ({', '.join(_shortest(role))})" for role in ROLES)


def _shortest(role: str) -> list[str]:
    """Return the other names of a role that are worth telling: not those of classes, nor of versions."""
    names = _NAMES[role].split()[1:]
    return [name for name in names if "message" not in name and not any(map(str.isdigit, name))]


__all__ = ["CALL", "ROLE_KEYS", "UNKNOWN_ROLE", "known_role", "known_roles", "role_advice", "role_name", "role_of"]
