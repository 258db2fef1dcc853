"""What the documents hold: commands, files, links and figures."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, README_ZH = ROOT / "README.md", ROOT / "README.zh.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(10))
BATCH = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
SUPPORT = BATCH.replace('"role": "user"', '"from": "customer"').replace('"role": "assistant"', '"from": "agent"')
FILES = {
    **dict.fromkeys(("train.csv", "held_out.csv", "rows/train.csv", "rows/held_out.csv"), ROWS),
    "prompts.txt": "Say 3.\n",
    "tickets.csv": "ticket,category\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(120)),
    "replies.csv": "question,answer\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(20)),
    "identity.jsonl": BATCH,
    "corrections.jsonl": BATCH,
    "support.jsonl": SUPPORT,
    "schema.json": '{"enum": ["red"]}',
    "own.jinja": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
SHORTER = {
    **{command: ["--max-new-tokens", "4"] for command in ("generate", "eval", "compare", "verify")},
    "train": ["--no-sample-answers", "--report-rows", "2"],
    "demo": ["--num-epochs", "1"],
}


def commands(page: Path, *, program: str = "handspun") -> list[list[str]]:
    """The arguments of the lines of a page's code blocks that begin with the program, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"^(?: {4}.*\n)+", text, flags=re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(rf"{program} [a-z-]", line)]


def files(page: Path) -> dict[str, str]:
    """The blocks of YAML, which begin with a comment that names their file: name -> content."""
    found = re.findall(r"```yaml\n(# (\S+\.yaml).*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {name: content for content, name in found}


def links(page: Path) -> list[tuple[str, str]]:
    """(file, anchor) of the links that stay in the project; the file is "" for the page itself."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    return [(file, anchor) for file, _, anchor in (target.partition("#") for target in inside)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, without comments."""
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in _parts(page)[0]) if line]


def names(page: Path) -> list[str]:
    """What is code within a page's text."""
    return re.findall(r"`([^`]+)`", "\n".join(_parts(page)[1]))


def figures(page: Path) -> list[str]:
    """The numbers of a page's text, and of each line of a table all of them together, sorted."""
    found: list[str] = []
    for line in _parts(page)[1]:
        numbers = re.findall(r"\d[\d,.]*\d(?:e-\d+)?|\d(?:e-\d+)?", line)
        found += [f"| {' '.join(sorted(numbers))} |"] if line.startswith("|") else numbers
    return found


def _parts(page: Path) -> tuple[list[str], list[str]]:
    """(lines of code, lines of text)."""
    lines_of_code: list[str] = []
    text: list[str] = []
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        else:
            (lines_of_code if fenced or line.startswith(" " * 4) else text).append(line)
    return lines_of_code, text
