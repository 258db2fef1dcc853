"""Which test functions assert on every path that can be read off their code."""

import ast
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache


@dataclass
class Certainty:
    """What is known of a file: functions that surely assert, and collections that are surely not empty."""

    asserting: set[str] = field(default_factory=lambda: {"raises", "warns", "fail"})
    filled: set[str] = field(default_factory=set)

    def learn(self, tree: ast.AST) -> None:
        """Add the functions and the collections of a file; each may build on one that stands further down."""
        known = -1
        while known != (known := len(self.filled) + len(self.asserting)):
            self.filled |= {name for name, value in _assigned(tree) if self.is_filled(value)}
            self.asserting |= {function.name for function in functions(tree) if self.asserts(function.body)}

    def asserts(self, body: Sequence[ast.stmt]) -> bool:
        """Return whether these statements assert before they end or return."""
        return not self._may_return(body) and any(map(self._asserts, body))

    def _may_return(self, body: Sequence[ast.stmt]) -> bool:
        """Return whether these statements may return before anything is asserted."""
        for statement in body:
            if isinstance(statement, ast.Return):
                return not self._calls(statement)
            if not isinstance(statement, ast.FunctionDef) and any(map(self._may_return, _blocks(statement))):
                return True
            if self._asserts(statement):
                return False
        return False

    def _asserts(self, statement: ast.stmt) -> bool:
        match statement:
            case ast.Assert(test=ast.Call(func=ast.Name(id="all"), args=[ast.GeneratorExp() as each])):
                return self.is_filled(each)
            case ast.Assert():
                return True
            case ast.FunctionDef() | ast.ClassDef():
                return False
            case ast.With(items=items, body=body):
                return any(self._calls(item.context_expr) for item in items) or self.asserts(body)
            case ast.If(test=test, body=body, orelse=orelse):
                return self._calls(test) or (self.asserts(body) and self.asserts(orelse))
            case ast.For(iter=values, body=body):
                return self._calls(values) or (self.is_filled(values) and self.asserts(body))
            case ast.While(test=test):
                return self._calls(test)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
                is_handled = all(self.asserts(handler.body) for handler in handlers)
                return self.asserts(finalbody) or (is_handled and self.asserts([*body, *orelse]))
        return self._calls(statement)

    def _calls(self, node: ast.AST) -> bool:
        """Return whether this calls a function that asserts; those named check_ raise."""
        return any(name in self.asserting or name.startswith(("assert_", "check_")) for name in _called(node))

    def is_filled(self, node: ast.AST) -> bool:
        """Return whether a collection surely holds something."""
        match node:
            case ast.Name(id=name):
                return name in self.filled
            case ast.Constant(value=str(text)):
                return bool(text)
            case ast.Tuple(elts=each) | ast.List(elts=each) | ast.Set(elts=each):
                return any(self.is_filled(one.value) if isinstance(one, ast.Starred) else True for one in each)
            case ast.Dict(keys=keys, values=values):
                return any(key or self.is_filled(value) for key, value in zip(keys, values, strict=True))
            case ast.IfExp(body=one, orelse=other):
                return self.is_filled(one) and self.is_filled(other)
            case ast.BinOp(left=one, right=other):
                return self.is_filled(one) or self.is_filled(other)
            case ast.ListComp(generators=each) | ast.GeneratorExp(generators=each) | ast.DictComp(generators=each):
                return all(self.is_filled(one.iter) and not one.ifs for one in each)
            case ast.Call(func=ast.Name(id="range"), args=arguments):
                return all(isinstance(one, ast.Constant) for one in arguments)
            case ast.Call(func=ast.Name(id="zip"), args=arguments):
                return any(map(self.is_filled, arguments))
            case ast.Call(func=ast.Attribute(attr="items" | "values" | "keys", value=value)):
                return self.is_filled(value)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
                keeps = name in ("enumerate", "sorted", "list", "set", "product", "deepcopy")
                return keeps and bool(arguments) and all(map(self.is_filled, arguments))
        return False


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def known_from(helpers: Iterable[ast.AST]) -> Certainty:
    """Return what is known of the files whose functions tests call."""
    known = Certainty()
    for tree in helpers:
        known.learn(tree)
    return known


def uncertain_tests(tree: ast.AST, helpers: Certainty) -> list[str]:
    """Return the names of a file's tests that may end without an assertion."""
    known = copy.deepcopy(helpers)
    known.learn(tree)
    tests = [function for function in functions(tree) if function.name.startswith("test_")]
    return [test.name for test in tests if not known.asserts(test.body)]


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    return [*blocks, *(handler.body for handler in getattr(statement, "handlers", []))]


@cache
def _called(node: ast.AST) -> frozenset[str]:
    """Return the names of all functions called within."""
    names = set()
    for call in ast.walk(node):
        match call:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                names.add(name)
    return frozenset(names)


def _assigned(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for one, value in zip(names, values, strict=True):
                    if isinstance(one, ast.Name):
                        yield one.id, value
