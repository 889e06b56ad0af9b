"""Kernels with one bug put in: each synchronisation left out, weakened or moved, one at a time.

    for mutant in mutants(kernel):
        with mutant.active():
            ...  # launch the kernel in the emulator: it must fail or give wrong numbers

A mutant stands in for one of the functions that make up a kernel, wherever that is called from.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import gluon_memory as memory
from gluon_emulator import EMULATED, REPLACED
from gluon_values import static_assert
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Mutant:
    """A function of a kernel with a bug, and what the bug is."""

    name: str
    original: Callable
    changed: Callable

    def active(self) -> AbstractContextManager:
        """Let the emulator run it in place of the original."""
        return mock.patch.dict(REPLACED, {self.original: self.changed})


def edited(kernel: Any, old: str, new: str) -> Mutant:
    """Replace text in the source of one kernel function, where it must occur once.

    Raises:
        ValueError: It does not occur, or more than once.
    """
    function = kernel.fn
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        text = f"old must occur once in {function.__name__}, not {source.count(old)} times: {old!r}"
        raise ValueError(text)
    name = f"{function.__name__}: {old.strip()!r} became {new.strip()!r}"
    return Mutant(name, function, _compiled(function, ast.parse(source.replace(old, new))))


def mutants(kernel: Any) -> Iterator[Mutant]:
    """Yield the bugs that can be put into a kernel and the Gluon functions that it calls.

    - A call that is a statement (wait, arrival, copy, store, barrier, call of a Gluon function) is
      left out, and so is a wait for products.
    - A wait has the other parity; a wait for products or stores lets one more of them run.
    - An arrival comes ahead of the statement before it that reads, or waits for reads.
    - A barrier expects other numbers of bytes, or is initialised with another count.

    Names of mutants tell them apart and do not depend on line numbers.
    """
    for function in _functions(kernel):
        counts: dict[str, int] = {}
        for name, tree in _changes(function):
            counts[name] = counts.get(name, 0) + 1
            name = f"{function.__name__}: {name} #{counts[name]}"
            yield Mutant(name, function, _compiled(function, tree))


def _tree(function: Callable) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _compiled(function: Callable, tree: ast.Module) -> Callable:
    if function.__closure__:
        raise ValueError(f"{function.__name__} must be defined at module level: it has a closure")
    tree.body[0].decorator_list = []
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    return scope[function.__name__]


# -------------------------------------------------------------------------------- what is called
_STANDING_IN = {function for _, function in EMULATED.values()} | {memory.Shared.load}


def _meaning(node: ast.AST, names: dict) -> Any:
    """Return what a name in kernel code, or an attribute of a module, means."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _meaning(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
    return None


def _called(node: ast.AST, names: dict) -> Callable | None:
    """Return what stands in for what a call calls, or the function of the kernel that it calls."""
    if not isinstance(node, ast.Call):
        return None
    value = _meaning(node.func, names)
    if id(value) in EMULATED:
        return EMULATED[id(value)][1]
    if isinstance(value, (JITFunction, InterpretedFunction)):
        return value.fn
    is_load = value is None and isinstance(node.func, ast.Attribute) and node.func.attr == "load"
    return memory.Shared.load if is_load else None


def _reached(tree: ast.AST, names: dict) -> set[Callable]:
    """Return what is called inside, and what that calls."""
    found = {_called(node, names) for node in ast.walk(tree)} - {None}
    for function in found - _STANDING_IN:
        found |= _reached(_tree(function), function.__globals__)
    return found


def _functions(kernel: Any) -> list[Callable]:
    """Return the Gluon functions that a kernel is made of."""
    functions = [kernel.fn]
    for function in functions:
        for node in ast.walk(_tree(function)):
            value = _meaning(node, function.__globals__)
            if isinstance(value, JITFunction) and value.is_gluon() and value.fn not in functions:
                functions.append(value.fn)
    return functions


# -------------------------------------------------------------------------------- the bugs
_READS = {memory.warpgroup_mma_wait, memory.store_wait, memory.Shared.load}


def _changes(function: Callable) -> Iterator[tuple[str, ast.Module]]:
    tree, names = _tree(function), function.__globals__
    blocks = [
        block
        for node in ast.walk(tree.body[0])
        for block in (getattr(node, "body", None), getattr(node, "orelse", None))
        if isinstance(block, list)
    ]
    for block in blocks:
        original = list(block)
        for i, statement in enumerate(original):
            text = textwrap.shorten(ast.unparse(statement), 90)
            for how, changed in _changed(statement, names):
                block[:] = [*original[:i], changed, *original[i + 1 :]]
                yield f"{text} {how}", copy.deepcopy(tree)
            earlier = _earlier(original, i, names)
            if earlier is not None:
                block[:] = [
                    *original[:earlier],
                    statement,
                    *original[earlier:i],
                    *original[i + 1 :],
                ]
                ahead_of = textwrap.shorten(ast.unparse(original[earlier]), 60)
                yield f"{text} ahead of {ahead_of}", copy.deepcopy(tree)
        block[:] = original


def _changed(statement: ast.stmt, names: dict) -> Iterator[tuple[str, ast.stmt]]:
    if not isinstance(statement, (ast.Expr, ast.Assign)):
        return
    called = _called(statement.value, names)
    if called is memory.warpgroup_mma_wait:
        deps = next(k.value.elts for k in statement.value.keywords if k.arg == "deps")
        value = deps[0] if len(deps) == 1 else ast.Tuple(deps, ast.Load())
        yield "left out", ast.Assign(statement.targets, value)
    elif isinstance(statement, ast.Expr) and called not in (None, static_assert):
        yield "left out", ast.Pass()
    for how, place, keyword, expression in {
        memory.warpgroup_mma_wait: [("waits for one less", 0, "num_outstanding", "{} + 1")],
        memory.store_wait: [("waits for one less", 0, "pendings", "{} + 1")],
        memory.mbarrier_wait: [("with the other parity", 1, "phase", "{} ^ 1")],
        memory.mbarrier_expect: [
            ("expects half", 1, "", "{} // 2"),
            ("expects more", 1, "", "{} + 16"),
        ],
        memory.mbarrier_init: [
            ("counts one more", 1, "count", "{} + 1"),
            ("counts one less", 1, "count", "{} - 1"),
        ],
    }.get(called, ()):
        yield how, _with_argument(statement, place, keyword, expression)


def _with_argument(statement: ast.stmt, place: int, keyword: str, expression: str) -> ast.stmt:
    """Change one argument of the statement's call."""
    changed = copy.deepcopy(statement)
    call = changed.value
    given = next((k for k in call.keywords if k.arg == keyword), None)
    old = given.value if given else call.args[place]
    new = ast.parse(expression.format(f"({ast.unparse(old)})"), mode="eval").body
    if given:
        given.value = new
    else:
        call.args[place] = new
    return changed


def _earlier(block: list[ast.stmt], i: int, names: dict) -> int | None:
    """Return the place of the last statement that an arrival has to come after, if any."""
    called = _reached(block[i], names)
    if memory.mbarrier_arrive not in called or called & _READS:
        return None
    for place in reversed(range(i)):
        if _reached(block[place], names) & _READS:
            used = {x.id for x in ast.walk(block[i]) if isinstance(x, ast.Name)}
            made = {
                x.id
                for statement in block[place:i]
                for x in ast.walk(statement)
                if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
            }
            return None if used & made else place
    return None
