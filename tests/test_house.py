"""The house itself: what imports what, how long files are, what is public."""

import ast
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

import handspun
from assertions import known_from, uncertain_tests

SOURCE = Path(handspun.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# A room imports only from rooms above it. `training` and `decoding` do not know each other.
ROOMS = [
    {"errors", "config", "files", "display"},
    {"data"},
    {"kernels"},
    {"models"},
    {"training", "decoding"},
    {"verification", "evaluation", "preflight"},
    {"runs"},
    {"report", "exports"},
    {"demo", "api", "serve"},
    {"cli"},
    {"__main__", "__init__"},
]
WRITES_THE_REPORT = "runs/artifacts.py"
"""A run ends with its report, whose pages are made of what `runs` has written."""
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("handspun.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    allowed = {room, "report"} if path.relative_to(SOURCE).as_posix() == WRITES_THE_REPORT else {room}
    others = imported_rooms(TREES[path]) - allowed
    assert [other for other in others if FLOOR[other] > FLOOR[room]] == []
    assert {"training": "decoding", "decoding": "training"}.get(room) not in others


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in TREES[path].body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(TREES[path])


def test_train_step_fits_on_one_screen() -> None:
    tree = TREES[SOURCE / "training" / "loop.py"]
    step = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "train_step")
    assert step.end_lineno is not None
    body = step.end_lineno - step.body[1].lineno + 1  # without the docstring
    assert body <= 30


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Importing the folder would put it in the function's place."""
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not folders & set(handspun.__all__)


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(Path(__file__).parent)))
def test_no_test_imports_another(path: Path) -> None:
    """What several share is in tests/helpers or in a conftest.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in modules if module.split(".")[0] == "tests" or module.startswith("test_")]


HELPERS = known_from(
    ast.parse(path.read_text(encoding="utf-8")) for path in TESTS if path.parent.name == "helpers"
)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(Path(__file__).parent)))
def test_every_test_asserts_whatever_its_path(path: Path) -> None:
    """An assertion only inside of a branch, or of a loop over what may be empty, may never be made."""
    assert uncertain_tests(ast.parse(path.read_text(encoding="utf-8")), HELPERS) == []


def test_uncertain_tests_names_those_that_may_end_without_an_assertion() -> None:
    certain = [
        "assert x", "for i in (1, 2):\n  assert i", "for i in range(3):\n  with raises(E):\n    f()",
        "if x:\n  assert y\nelse:\n  assert z", "checked()", "torch.testing.assert_close(a, b)",
        "if x:\n  assert y\n  return\nassert z", "try:\n  assert x\nexcept E:\n  assert y",
        "assert all(x for x in FEW)",
    ]  # fmt: skip
    uncertain = [
        "f()", "for i in found:\n  assert i", "for i in range(n):\n  assert i", "if x:\n  assert y",
        "if x:\n  return\nassert y", "try:\n  assert x\nexcept E:\n  pass", "while x:\n  assert y",
        "assert all(x for x in found)", "for i in (1, 2):\n  if i:\n    continue\n  g()",
        "def inner():\n  assert x",
    ]  # fmt: skip
    bodies = {f"test_{n}": body for n, body in enumerate([*certain, *uncertain])}
    tests = "".join(f"def {name}():\n{indent(body, '  ')}\n" for name, body in bodies.items())
    tree = ast.parse(f"{tests}FEW = [1, 2]\ndef checked():\n  assert x\n")
    assert uncertain_tests(tree, known_from([])) == list(bodies)[len(certain) :]


def test_exported_members() -> None:
    assert handspun.__all__ == sorted(handspun.__all__)
    assert handspun.__all__ == [
        "ChatModel",
        "Comparison",
        "ConfigError",
        "DataConfig",
        "DataError",
        "ExportConfig",
        "GenerationChunk",
        "GenerationOptions",
        "GenerationResult",
        "HandspunError",
        "ModelError",
        "OutputError",
        "Preview",
        "Scores",
        "StoppedError",
        "TemplateError",
        "TrainConfig",
        "TrainedRun",
        "TrainingError",
        "compare",
        "evaluate",
        "export",
        "generate",
        "load",
        "preview",
        "stream",
        "train",
    ]
    for name in handspun.__all__:
        assert getattr(handspun, name).__name__ == name


@pytest.mark.parametrize("code", ["import handspun", "from handspun.cli import main; main(['train', '--help'])"])
def test_import_and_help_bring_in_neither_torch_nor_transformers(code: str) -> None:
    heavy = "; import sys; sys.exit(bool({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + heavy], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
