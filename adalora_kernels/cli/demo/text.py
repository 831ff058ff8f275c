"""Real English text that every Python has: signatures and summaries of the standard library.

The sources are parsed and never imported, so reading them has no side effects and depends on the Python version alone.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

# Not library text: tests and their data, installed packages, and generated tables of topics.
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_MIN_SUMMARY_WORDS = 3
_SHARES = {"train": 0.55, "calibration": 0.15, "held_out": 0.3}


@dataclass(frozen=True)
class Pair:
    """A signature and the summary that its author wrote.

    Attributes:
        package: top-level package or module, such as ``email``.
        module: dotted name of the module, such as ``email.message``.
        signature: qualified name and argument names, as lower-case words.
        summary: first sentence of the docstring.
    """

    package: str
    module: str
    signature: str
    summary: str


Documented: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """A function, method or class with a docstring.

    Attributes:
        package, module: as in ``Pair``.
        name: qualified, such as ``Message.get``.
        node: its syntax.
        docstring: without its indentation.
    """

    package: str
    module: str
    name: str
    node: Documented
    docstring: str


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the corpus: no package is in both ``base`` and the others, no module in two of the others.

    Attributes:
        base: what the base model learns first.
        train: what it is then adapted to.
        calibration: modules of the adapted packages that choose the decision threshold.
        held_out: modules of the adapted packages that are only ever judged.
    """

    base: list[Pair]
    train: list[Pair]
    calibration: list[Pair]
    held_out: list[Pair]


def split_name(name: str) -> str:
    """Lower-case words of an identifier: ``HTTPServer.get_url`` becomes ``http server get url``."""
    return " ".join(word.lower() for word in _WORD.findall(name))


def first_sentence(docstring: str) -> str:
    """First sentence of the first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def read_corpus(root: Path | None = None) -> list[Pair]:
    """Every documented function, method and class below ``root``, in the order of their paths.

    A summary that occurs twice is kept once: a copy would leak from training into the held-out modules, and make a
    right answer count as a wrong one.

    Args:
        root: a folder of Python sources; None for this Python's standard library.

    Raises:
        FileNotFoundError: if no documented definition is found (a Python that ships without its sources).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, Pair] = {}
    for definition in definitions(root):
        summary = first_sentence(definition.docstring)
        name = split_name(definition.name)
        signature = f"{name} ( {' , '.join(split_name(a) for a in _arguments(definition.node))} )"
        if len(summary.split()) >= _MIN_SUMMARY_WORDS and name:
            pairs.setdefault(summary, Pair(definition.package, definition.module, signature, summary))
    if not pairs:
        raise FileNotFoundError(f"no documented Python sources below {root}: the demo reads the docstrings there")
    return list(pairs.values())


def definitions(root: Path | None = None) -> Iterator[Definition]:
    """Every documented function, method and class below ``root``, in the order of their paths.

    Args:
        root: a folder of Python sources; None for this Python's standard library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = ".".join(parts).removesuffix(".__init__")
            for name, node, docstring in _below(ast.parse(path.read_bytes(), str(path)), ""):
                yield Definition(parts[0], module, name, node, docstring)


def _below(node: ast.AST, prefix: str) -> Iterator[tuple[str, Documented, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented):
            docstring = ast.get_docstring(child)
            if docstring:
                yield prefix + child.name, child, docstring
            yield from _below(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _below(child, prefix)


def _arguments(node: Documented) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return [ast.unparse(base) for base in node.bases]
    a = node.args
    named = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return [arg.arg for arg in named if arg.arg not in ("self", "cls")]


def split_corpus(pairs: Sequence[Pair]) -> Splits:
    """Half of the packages for the base; of the other half's modules, some to train on, to calibrate with, to hold out.

    Packages and modules are dealt out largest first, so that every part holds large and small ones in every Python.
    """
    packages = dealt(Counter(pair.package for pair in pairs), {"base": 0.5, "adapted": 0.5})
    adapted = [pair for pair in pairs if packages[pair.package] == "adapted"]
    modules = dealt(Counter(pair.module for pair in adapted), _SHARES)
    parts: dict[str, list[Pair]] = {part: [] for part in _SHARES}
    for pair in adapted:
        parts[modules[pair.module]].append(pair)
    return Splits(base=[pair for pair in pairs if packages[pair.package] == "base"], **parts)


def dealt(sizes: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, str]:
    """The part that each name goes to: largest names first, each to the part that lacks most of its share."""
    missing = {part: share * sum(sizes.values()) for part, share in shares.items()}
    part_of = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        part = max(missing, key=missing.__getitem__)
        part_of[name] = part
        missing[part] -= sizes[name]
    return part_of


__all__ = [
    "Definition",
    "Pair",
    "Splits",
    "dealt",
    "definitions",
    "first_sentence",
    "read_corpus",
    "split_corpus",
    "split_name",
]
