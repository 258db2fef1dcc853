"""Counts what docs/design.md says of the code's size and shape.

python tests/measures.py
"""

import ast
import inspect
import io
import re
import sys
import tempfile
import tokenize
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "handspun"
sys.path.insert(0, str(ROOT / "tests" / "helpers"))


def main() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    most = max(functions, key=_parameters)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    comments = sum(_own_line_comments(path) for path in files)
    rows = {
        "files in src": len(files),
        "mean lines of a file": round(sum(lines) / len(files)),
        "lines of source": sum(lines),
        "project frames from a command to backward()": _frames_to_backward(),
        "with statements around the loop": _with_statements(),
        "most parameters of a function": f"{_parameters(most)} ({most.name})",
        "dependencies without extras": len(project["dependencies"]),
        "own-line comments": f"{comments} ({comments / sum(lines):.1%} of lines)",
    }
    for name, value in rows.items():
        print(f"{name:<45}{value}")


def _parameters(node: ast.FunctionDef) -> int:
    arguments = node.args
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])


def _own_line_comments(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens)


def _with_statements() -> int:
    """Return how many `with` statements enclose the loop, from `train` on."""
    tree = ast.parse((SOURCE / "runs" / "train.py").read_text(encoding="utf-8"))
    inside = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("train", "fit")]
    return sum(isinstance(node, ast.With) for function in inside for node in ast.walk(function))


def _frames_to_backward() -> int:
    """Return the project's frames between a command and PyTorch's backward pass, in a run of one step."""
    import torch

    from handspun.cli import main as command
    from tiny import tiny_model, tiny_tokenizer

    depths: list[int] = []
    backward = torch.autograd.backward

    def counted(*arguments: object, **options: object) -> None:
        names = [frame.filename for frame in inspect.stack()]
        ours = [name for name in names if name.startswith(str(SOURCE))]
        commands = [i for i, name in enumerate(ours) if re.search(r"cli/(?!entry)", name)]
        depths.append(commands[0] + 1)
        backward(*arguments, **options)  # type: ignore[arg-type]

    torch.autograd.backward = counted
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen2", tie_word_embeddings=True).save_pretrained(f"{folder}/model")
        tiny_tokenizer().save_pretrained(f"{folder}/model")
        Path(f"{folder}/train.csv").write_text("instruction,output\nSay hi.,Hi.\n", encoding="utf-8")
        options = [
            "--output-dir",
            f"{folder}/output",
            "--num-epochs",
            "1",
            "--no-sample-answers",
            "--report-rows",
            "0",
        ]
        assert command(["train", "--model", f"{folder}/model", "--data", f"{folder}/train.csv", *options]) == 0
    torch.autograd.backward = backward
    return max(depths)


if __name__ == "__main__":
    main()
