"""What to do about JSON that is none: the habits of hands, JavaScript and Python that JSON does not have."""

import json
import re

_PYTHON = re.compile(r"(?:None|True|False)\b")
_BEYOND = {"undefined", "nan", "inf", "-inf", "-nan"}


def remedy(error: json.JSONDecodeError) -> str:
    """Return a sentence on how to mend the place of the error."""
    text, place = error.doc, error.pos
    at, before = text[place : place + 1], text[:place].rstrip()[-1:]
    rest = text[place : place + 20]
    if error.msg.startswith("Illegal trailing comma") or (at in ("]", "}") and before == ","):
        return "Remove the comma before the closing bracket."
    if not text[place:].strip() or error.msg.startswith("Unterminated string"):
        return "The text ends before the value does: it may be cut short. Write or download it again."
    if at == "'" or _PYTHON.match(rest):
        return "This is Python's notation (str() or repr()); write it with json.dumps."
    if at in ("#", "/"):
        return "JSON has no comments; remove it."
    if at in "“”„«»‘’":
        return "Write straight double quotes in place of typographic ones."
    if "control character" in error.msg:
        return r"Inside of a text, write a line break as \n and a tab as \t."
    if "escape" in error.msg:
        return r"Inside of a text, write a backslash as \\."
    return _remedy_for_structure(error, at, rest)


def _remedy_for_structure(error: json.JSONDecodeError, at: str, rest: str) -> str:
    if error.msg == "Extra data":
        if at == ",":
            return "Remove the comma behind the value, or write all values as one list: [ ..., ... ]."
        return "Remove what stands behind the value, or write all values as one list: [ ..., ... ]."
    if "delimiter" in error.msg:
        sign = "colon" if "':'" in error.msg else "comma"
        return f'Put the {sign} that is missing before it; a quote inside of a text is written \\".'
    if "property name" in error.msg:
        return "Put the names of an object in double quotes."
    if re.split(r"[\s,\]}]", rest.lower())[0] in _BEYOND:
        return "Write null, or the value that is meant."
    return "Mend the place, or write the file with a JSON library (json.dumps)."
