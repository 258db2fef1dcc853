"""Put small faults into the core's code, one at a time, and run the tests that should notice.

    python tests/mutants.py                          # what `make mutants` runs: an hour at most on two cores
    python tests/mutants.py training/optim.py --all  # every mutant of one file

The faults (mutants) are mutmut's: `<=` for `<`, `-` for `+`, a number one larger, `or` for `and`, an argument left
out. mutmut's own runner does not change decorated functions, which are half of the core, and it chooses tests by
what they touch; here mutants.toml says which tests belong to which file. Each mutant is run in a fork of a process
that has imported torch and transformers, by a loader that gives the changed code in place of the file's.

Faults that no test can notice, because they mean the same, are listed in mutants.toml and left out of those drawn.
Ends with 1 if fewer than 95 % of the others are noticed.
"""

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import libcst
import libcst.metadata
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "handspun"
ENOUGH = 0.95
"""Share of the mutants that has to be noticed."""
_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
_SWAPPED |= {"argmax": "argmin", "amax": "amin", "amin": "amax", "zeros": "ones", "zeros_like": "ones_like"}
"""Names that mutmut does not change, and that are easily mistaken for each other."""
_LEFT_ALONE = (
    libcst.Annotation, libcst.Decorator, libcst.Import, libcst.ImportFrom, libcst.Raise, libcst.Assert,
    libcst.SimpleString, libcst.ConcatenatedString, libcst.FormattedString,
)  # fmt: skip
"""Neither types nor texts are changed, nor what an error says; what leads to it is."""

_UNSEEN = {"device", "strict"}
"""Arguments that are left alone, too: where a tensor is, which shows on a GPU only, and whether zip compares
lengths, which are the same as long as the code is right."""


@dataclass(frozen=True)
class Mutant:
    """One fault in a file: a node of its code, and what takes its place."""

    module: libcst.Module
    line: int
    function: str
    node: libcst.CSTNode
    changed: libcst.CSTNode
    nth: int
    """Of the faults of the function that read the same."""

    @property
    def code(self) -> str:
        """Of the whole file."""
        changed = self.module.deep_replace(self.node, self.changed)
        assert isinstance(changed, libcst.Module)
        return changed.code

    @property
    def text(self) -> str:
        """What identifies it, wherever its function stands in the file: `function: before  ->  after`."""
        return f"{self.function}: {_change(self.module, self.node, self.changed)}" + f" ({self.nth})" * (
            self.nth > 1
        )

    def __str__(self) -> str:
        return f"{self.line}: {self.text}"


def _change(module: libcst.Module, node: libcst.CSTNode, changed: libcst.CSTNode) -> str:
    """Write both, of long ones 100 characters where they begin to differ."""
    before, after = (" ".join(module.code_for_node(n).split()) for n in (node, changed))
    same = next((i for i, pair in enumerate(zip(before, after, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, same - 60) if max(len(before), len(after)) > 100 else 0
    return f"{before[start : start + 100]}  ->  {after[start : start + 100]}"


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    wrapper = libcst.metadata.MetadataWrapper(libcst.parse_module(path.read_text(encoding="utf-8")))
    visitor = _Visitor()
    wrapper.visit(visitor)
    seen = Counter[tuple[str, str]]()
    mutants = []
    for line, function, node, changed in sorted(visitor.found, key=lambda found: found[0]):
        same = function, _change(wrapper.module, node, changed)
        seen[same] += 1
        mutants.append(Mutant(wrapper.module, line, function, node, changed, seen[same]))
    return mutants


class _Visitor(libcst.CSTVisitor):
    """Collects (line, function, node, what takes its place)."""

    METADATA_DEPENDENCIES = (libcst.metadata.PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[int, str, libcst.CSTNode, libcst.CSTNode]] = []
        self.within: list[str] = []

    def on_leave(self, original_node: libcst.CSTNode) -> None:
        if isinstance(original_node, libcst.FunctionDef | libcst.ClassDef):
            self.within.pop()

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
            self.within.append(node.name.value)
        if isinstance(node, _LEFT_ALONE) or _is_type(node) or _is_unseen(node):
            return False
        line = self.get_metadata(libcst.metadata.PositionProvider, node).start.line
        function = ".".join(self.within) or "module"
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                unseen = _unseen_arguments(node)
                self.found += [
                    (line, function, node, new) for new in operator(node) if _unseen_arguments(new) == unseen
                ]
        if isinstance(node, libcst.Name) and node.value in _SWAPPED:
            self.found.append((line, function, node, node.with_changes(value=_SWAPPED[node.value])))
        return True


def _unseen_arguments(node: libcst.CSTNode) -> list[str]:
    """A call's arguments of `_UNSEEN`, as they are written."""
    arguments = node.args if isinstance(node, libcst.Call) else ()
    module = libcst.Module([])
    return [module.code_for_node(arg.value) for arg in arguments if _is_unseen(arg)]


def _is_unseen(node: libcst.CSTNode) -> bool:
    return isinstance(node, libcst.Arg) and node.keyword is not None and node.keyword.value in _UNSEEN


def _is_type(node: libcst.CSTNode) -> bool:
    """Whether the statement only names a type, or what a module exports."""
    if not isinstance(node, libcst.Assign):
        return False
    target = node.targets[0].target
    return isinstance(target, libcst.Name) and (target.value == "__all__" or target.value[0].isupper())


def left_out(table: dict[str, Any], file: str, mutants: Sequence[Mutant]) -> set[str]:
    """Return the listed faults of the file. Raise ValueError for an entry that matches none."""
    listed = {entry["fault"] for entry in table["same"] if entry["file"] == file}
    if gone := listed - {mutant.text for mutant in mutants}:
        raise ValueError(f"mutants.toml lists faults that {file} no longer has: {'; '.join(sorted(gone))}")
    return listed


def sample(mutants: Sequence[Mutant], most: int | None) -> list[Mutant]:
    """Draw at most so many by their texts' hashes: the same ones each time, whatever else of the file changes."""
    drawn = sorted(mutants, key=lambda mutant: hashlib.sha256(mutant.text.encode()).digest())[:most]
    return sorted(drawn, key=lambda mutant: mutant.line)


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module the code of a mutant."""

    def __init__(self, module: str, path: Path, code: str) -> None:
        self.module, self.path, self.code = module, path, code

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.code, self.path, "exec"), module.__dict__)


def run_tests(file: str, code: str, tests: Sequence[str]) -> int:
    """pytest's exit status with this code in place of the file's: 0 if nothing was noticed."""
    import hypothesis
    import pytest

    # A failing example is enough: nobody reads the smallest one, which takes most of the time to find.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("first example", phases=phases)
    hypothesis.settings.load_profile("first example")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    module = "handspun." + file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _Loader(module, SOURCES / file, code))
    # Nothing that only explains a failure, or that costs time at the start or the end of every run.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-x", "-q", "--tb=no", "--assert=plain", "--hypothesis-seed=0", "-p", "_hypothesis_pytestplugin"]
    options += ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    return int(pytest.main([*options, *tests]))


def in_fork(file: str, code: str, tests: Sequence[str]) -> int:
    """The process that runs the tests; it is its group's leader, so that what it starts ends with it."""
    if child := os.fork():
        return child
    status = 70
    try:
        os.setpgid(0, 0)
        status = run_tests(file, code, tests)
    finally:
        os._exit(status)


def unnoticed(
    file: str, mutants: Sequence[Mutant], tests: Sequence[str], *, jobs: int, limit: float
) -> Iterator[Mutant]:
    """Run the tests on each mutant, `jobs` at a time, and yield those at which no test fails."""
    waiting, running = list(reversed(mutants)), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[in_fork(file, mutant.code, tests)] = mutant, time.monotonic() + limit
        for child, (mutant, end) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                if status == 0:
                    yield mutant
            elif time.monotonic() > end:  # it hangs, which is noticed
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)


def main() -> int:
    """Return 0 if enough of the mutants are noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of mutants.toml (default: all of them)")
    parser.add_argument("--most", type=int, default=40, help="mutants of a file, drawn (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every mutant, whatever time it takes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    table = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
    if unknown := set(arguments.files) - set(table["tests"]):
        expected = ", ".join(table["tests"])
        parser.error(f"mutants.toml has no {', '.join(sorted(unknown))} (expected one of {expected}).")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src")]
    _import_what_is_slow()
    tried = noticed = same = 0
    for file in arguments.files or table["tests"]:
        found = mutants_of(SOURCES / file)
        drawn = sample(found, None if arguments.all else arguments.most)
        listed = left_out(table, file, found)
        chosen = [mutant for mutant in drawn if mutant.text not in listed]
        same += len(drawn) - len(chosen)
        tests = [f"tests/{name}" for name in table["tests"][file]]
        began = time.monotonic()
        if os.waitpid(in_fork(file, (SOURCES / file).read_text(encoding="utf-8"), tests), 0)[1]:
            print(f"{file}: its tests fail without any fault in it", flush=True)
            return 1
        limit = 10 + 4 * (time.monotonic() - began)
        survivors = 0
        for mutant in unnoticed(file, chosen, tests, jobs=arguments.jobs, limit=limit):
            survivors += 1
            print(f"  {file}:{mutant}", flush=True)
        tried, noticed = tried + len(chosen), noticed + len(chosen) - survivors
        print(
            f"{file}: {len(chosen) - survivors} of {len(chosen)} noticed ({len(found)} mutants in all), "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(
        f"{noticed} of {tried} noticed: {math.floor(1000 * noticed / tried) / 10} %; "
        f"{same} that mean the same, listed in mutants.toml, left out"
    )
    return int(noticed < ENOUGH * tried)


def _import_what_is_slow() -> None:
    """What every fork would import anew; nothing of handspun, which is what is changed."""
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    torch.set_num_threads(1)  # a fork does not get the threads that were started before it


if __name__ == "__main__":
    sys.exit(main())
