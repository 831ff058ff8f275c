"""Fingerprints of the layer's kernels, by which a measurement is known to be of the kernels that are there.

A kernel's covers its own code and that of every Triton function that it calls, without comments, docstrings and layout.
Nothing is imported for it.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from io import StringIO
from pathlib import Path

_FOLDER = Path(__file__).parent
_ENGINE = "engine"  # has functions of its own, and names of its own for them
# Names of kernels in the tables, where the function is called otherwise than _svd_linear_<name>_kernel.
_FUNCTIONS = {
    "one_gemm": "backward_gemm",
    "dx": "backward_gemm",
    "g": "backward_t",
    "t": "backward_t",
    "v": "backward_v",
    "x": "backward_x",
    "group_x": "group_backward_x",
}


@cache
def fingerprint(*kernels: str) -> str:
    """Of kernels by their names in the tables.

    Raises:
        KeyError: there is no such kernel.
    """
    found = sha256()
    wanted = {f"_svd_linear_{_FUNCTIONS.get(kernel, kernel)}_kernel" for kernel in kernels}
    for name in sorted(_with_callees(wanted)):
        found.update(f"{name}\n{_functions()[name]}\n".encode())
    return found.hexdigest()[:12]


@cache
def fingerprint_of_all() -> str:
    """Of every kernel of the layer, which is what a choice between plans hangs on."""
    kernels = [name for name in _functions() if name.startswith("_svd_linear_")]
    return fingerprint(*(name[len("_svd_linear_") : -len("_kernel")] for name in kernels))


def _with_callees(names: Iterable[str]) -> set[str]:
    functions, found, left = _functions(), set[str](), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            words = set(functions[name].split(" "))
            left += [other for other in functions if other in words]
    return found


@cache
def _functions() -> dict[str, str]:
    """The tokens of every Triton function of the layer, and of its constants, by name."""
    found: dict[str, str] = {}
    for path in sorted(_FOLDER.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if _ENGINE not in path.relative_to(_FOLDER).parts and ("triton.jit" in text or "constexpr(" in text):
            found |= dict(_of_file(text))
    return found


def _of_file(text: str) -> Iterator[tuple[str, str]]:
    for node in ast.parse(text).body:
        written = ast.get_source_segment(text, node) or ""
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list):
            if ast.get_docstring(node) is not None:
                written = written.replace(ast.get_source_segment(text, node.body[0]) or "", "pass", 1)
            yield node.name, _tokens(written)
        elif isinstance(node, ast.Assign) and "constexpr" in ast.dump(node.value):
            yield from ((target.id, _tokens(written)) for target in node.targets if isinstance(target, ast.Name))


def _tokens(written: str) -> str:
    """Without comments and layout, and the same in every version of Python, which syntax trees are not."""
    marks = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.COMMENT: "", tokenize.NL: "", tokenize.NEWLINE: ";"}
    tokens = tokenize.generate_tokens(StringIO(written).readline)
    return " ".join(filter(None, (marks.get(token.type, token.string) for token in tokens)))


__all__ = ["fingerprint", "fingerprint_of_all"]
