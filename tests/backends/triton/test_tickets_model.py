"""Tickets, flags and arrivals in every order of the programs' atomics: no deadlock, no early read, zeros at the end.

The functions of ``tickets`` run as they are written, but what they call of ``tl`` is done by a model of memory. In it a
program is two threads: one makes the atomics, the other stores and loads; only barriers let either see what the other
has seen. Between programs only release and acquire do, also through other programs' atomics on the same flag. A loop
that waits for a flag sleeps while the flag is zero.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from adalora_kernels.backends.triton import tickets  # noqa: E402

Steps = Generator[tuple[Any, ...], Any, Any]
Functions = dict[str, Callable[..., Any]]
NAMES = ("take_ticket", "tile_of", "publish", "await_published", "arrives_last")
ATOMICS = ("atomic_add", "atomic_xchg")


class _Yielded(ast.NodeTransformer):
    """Calls of ``tl`` become yields of what is called."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        return ast.Yield(ast.Tuple([ast.Constant(node.func.attr), *arguments], ast.Load()))


def as_steps(function: Any, old: str = "", new: str = "") -> Callable[..., Any]:
    """A kernel's function as a generator of its calls, with ``new`` in place of the first ``old``."""
    source = inspect.getsource(function.fn)
    assert old in source
    tree = _Yielded().visit(ast.parse(source.replace(old, new, 1)))
    definition = tree.body[0]
    definition.decorator_list = []
    for argument in definition.args.args:
        argument.annotation = None
    made: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), definition.name, "exec"), made)
    steps: Callable[..., Any] = made[definition.name]
    return steps


def functions(faulty: str = "", old: str = "", new: str = "") -> Functions:
    """Those of ``tickets``, one of them with a fault."""
    return {name: as_steps(getattr(tickets, name), *((old, new) if name == faulty else ())) for name in NAMES}


@cache
def swizzled(*arguments: int) -> tuple[int, int]:
    """``tl.swizzle2d``, which calls nothing but ``minimum``."""
    steps, answer = as_steps(tl.swizzle2d)(*arguments), None
    while True:
        try:
            _, *numbers = steps.send(answer)
        except StopIteration as end:
            place: tuple[int, int] = end.value
            return place
        answer = min(numbers)


class Launch:
    """The programs of a launch between two atomics, and the memory that they share."""

    def __init__(self, programs: list[Steps], cells: int) -> None:
        self.programs = programs
        self.values = [0] * cells
        self.released: list[frozenset[Any]] = [frozenset()] * cells  # what an acquire of the cell makes seen
        self.seen: list[list[set[Any]]] = [[set(), set()] for _ in programs]  # by the two threads of each
        self.returned: list[list[Any]] = [[] for _ in programs]  # by its atomics
        self.done: list[Any] = []
        self.next = [self._until_atomic(p, None) for p in range(len(programs))]

    def enabled(self) -> list[int]:
        """Programs whose next atomic may be made: all but those that ended, or wait for a flag that is zero."""
        asleep = [call and call[0] == "atomic_add" and call[2] == 0 == self.values[call[1]] for call in self.next]
        return [p for p, call in enumerate(self.next) if call and not asleep[p]]

    def step(self, p: int) -> None:
        """Make the next atomic of a program, and all it does before the one after that."""
        call = self.next[p]
        assert call is not None
        name, cell, operand, order = call
        before = self.values[cell]
        if order in ("acquire", "acq_rel"):
            self.seen[p][0] |= self.released[cell]
        if order in ("release", "acq_rel"):
            self.released[cell] |= self.seen[p][0]
        self.values[cell] = operand if name == "atomic_xchg" else before + operand
        self.returned[p].append(before)
        self.next[p] = self._until_atomic(p, before)

    def _until_atomic(self, p: int, result: Any) -> tuple[Any, ...] | None:
        threads = self.seen[p]
        try:
            while (call := self.programs[p].send(result))[0] not in ATOMICS:
                name, *arguments = call
                result = None
                if name == "num_programs":
                    result = len(self.programs)
                elif name == "swizzle2d":
                    result = swizzled(*arguments)
                elif name == "debug_barrier":
                    threads[0] |= threads[1]
                    threads[1] |= threads[0]
                elif name == "store":
                    threads[1].add(*arguments)
                elif name == "load":
                    assert arguments[0] in threads[1], f"{arguments[0]} is read before it is written"
                else:
                    assert name == "done"
                    self.done += arguments
        except StopIteration:
            return None
        return call

    def state(self) -> Any:
        seen = tuple(frozenset(thread) for threads in self.seen for thread in threads)
        return tuple(self.values), tuple(self.released), tuple(map(tuple, self.returned)), seen


def in_every_order(make: Callable[[], Launch], work: list[Any]) -> int:
    """How many states a launch can be in; all its ends are held to what they should be."""
    states: set[Any] = set()
    orders: list[tuple[int, ...]] = [()]
    while orders:
        order = orders.pop()
        launch = make()
        for p in order:
            launch.step(p)
        if launch.state() in states:
            continue
        states.add(launch.state())
        enabled = launch.enabled()
        if not enabled:
            assert not any(launch.next), "deadlock"
            assert not any(launch.values), f"the workspace is left with {launch.values}"
            assert sorted(launch.done) == work
        orders += [(*order, p) for p in enabled]
    return len(states)


def product(f: Functions, blocks_m: int, blocks_n: int, slab: int, group: int) -> Steps:
    """What a program of ``backward.gemm`` does about v; ``forward.gemm`` likewise about u, in slabs of one block."""
    slabs = -(-blocks_m // slab)
    while (ticket := (yield from f["take_ticket"](0, slabs * blocks_n))) < slabs * blocks_n:
        i, n = yield from f["tile_of"](ticket, slabs, blocks_n, group)
        for m in range(i * slab, min((i + 1) * slab, blocks_m)):
            if n == 0:
                yield "store", m
                yield from f["publish"](0, m, blocks_n - 1)
            else:
                yield from f["await_published"](0, m)
            yield "load", m
            yield "done", (m, n)


def arrival(f: Functions, layer: int, layers: int, items: int, item: int) -> Steps:
    """What a program of the engine's kernels does with its sums; those of ``shrink`` and ``finish`` know one layer."""
    yield "store", (layer, item)
    if (yield from f["arrives_last"](1 + layer, items)):
        for other in range(items):
            yield "load", (layer, other)
        yield "store", layer
        yield "done", layer
        if (yield from f["arrives_last"](0, layers)):
            for other in range(layers):
                yield "load", other
            yield "done", layers


def check_products(f: Functions, programs: int, blocks_m: int, blocks_n: int, slab: int, group: int) -> int:
    def make() -> Launch:
        return Launch([product(f, blocks_m, blocks_n, slab, group) for _ in range(programs)], 1 + blocks_m)

    return in_every_order(make, [*itertools.product(range(blocks_m), range(blocks_n))])


def check_arrivals(f: Functions, layers: int, items: int) -> int:
    def make() -> Launch:
        return Launch([arrival(f, i, layers, items, j) for i in range(layers) for j in range(items)], 1 + layers)

    return in_every_order(make, [*range(layers + 1)])


@pytest.mark.parametrize(
    ("programs", "blocks_m", "blocks_n", "slab", "group"),
    [(1, 3, 2, 1, 2), (2, 2, 3, 1, 2), (3, 2, 2, 1, 1), (3, 3, 2, 2, 8), (2, 3, 1, 1, 2), (3, 1, 3, 1, 8)],
)
def test_products(programs: int, blocks_m: int, blocks_n: int, slab: int, group: int) -> None:
    assert check_products(functions(), programs, blocks_m, blocks_n, slab, group) > 1


@pytest.mark.parametrize(("layers", "items"), [(1, 4), (2, 2), (3, 1)])
def test_arrivals(layers: int, items: int) -> None:
    assert check_arrivals(functions(), layers, items) > 1


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("take_ticket", "- 1:", ":"),
        ("tile_of", "ticket % blocks_n", "blocks_n - 1 - ticket % blocks_n"),
        ("publish", "tl.debug_barrier()", "pass"),
        ("publish", "release", "relaxed"),
        ("await_published", "acquire", "relaxed"),
        ("await_published", "-1", "1"),
        ("await_published", "tl.debug_barrier()", "pass"),
    ],
)
def test_a_fault_in_products_shows(name: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=r"deadlock|is read before|is left with"):
        for programs in (1, 2):
            check_products(functions(name, old, new), programs, 2, 2, 1, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.debug_barrier()", "pass"),
        ("tl.debug_barrier()\n    return", "return"),
        ("acq_rel", "acquire"),
        ("acq_rel", "release"),
        ('tl.atomic_xchg(workspace_ptr, 0, sem="relaxed")', "pass"),
    ],
)
def test_a_fault_in_arrivals_shows(old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=r"is read before|is left with"):
        check_arrivals(functions("arrives_last", old, new), 1, 3)
