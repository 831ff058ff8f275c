"""Small tasks of each kind, made from the standard library's docstrings, for machines without the hub.

Modules are dealt to training and evaluation, so that no module is in both.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from adalora_kernels.cli.demo.text import Definition, dealt, definitions, first_sentence, split_name
from benchmarks.paper.tasks import ANSWERS, CLASSIFICATION, REGRESSION, SUMMARIES, Task
from benchmarks.paper.tasks.load import TRAINING

EVALUATION = "validation"
PACKAGES = 16  # classes of task "package"
MOST_ROWS = {TRAINING: 3000, EVALUATION: 800}
_SHARES = {TRAINING: 0.75, EVALUATION: 0.25}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LEAST_WORDS = 4

TASKS = {
    task.name: task
    for task in (
        Task("order", "order of two sentences", CLASSIFICATION, ("first", "second"), ("accuracy",), None, classes=2),
        Task("package", f"which of {PACKAGES} packages", CLASSIFICATION, ("text",), ("accuracy",), None,
             classes=PACKAGES),
        Task("overlap", "words that are left", REGRESSION, ("first", "second"), ("pearson", "spearman"), None,
             classes=1),
        Task("default", "default of a parameter", ANSWERS, ("question", "context"), ("f1", "exact_match"), None,
             no_answer=True),
        Task("first-line", "a docstring's first line", SUMMARIES, ("body", "summary"),
             ("rouge1", "rouge2", "rougeLsum"), None),
    )
}  # fmt: skip

Parts = dict[str, list[Definition]]


def read(root: Path | None = None) -> Parts:
    """Every documented definition below ``root`` (None: the standard library), dealt to training and evaluation."""
    found = list(definitions(root))
    part_of = dealt(Counter(d.module for d in found), _SHARES)
    return {part: [d for d in found if part_of[d.module] == part] for part in _SHARES}


def make(name: str, parts: Parts, seed: int = 0) -> dict[str, Dataset]:
    """The rows of one stand-in, as ``tasks.load`` would give them.

    Args:
        name: of ``TASKS``.
        parts: of ``read``.
        seed: of what is drawn; not the seed of a training.
    """
    make_rows = _MAKERS[name]
    made = {}
    for part, found in parts.items():
        rows = make_rows(found, parts, random.Random(f"{seed} {part}"))
        random.Random(seed).shuffle(rows)
        made[part] = Dataset.from_list(rows[: MOST_ROWS[part]]).select_columns(list(TASKS[name].columns))
    return made


def sentences(docstring: str) -> list[str]:
    """A docstring's sentences, each on one line, without those of fewer than four words."""
    text = " ".join(docstring.split())
    return [s for s in _SENTENCE_END.split(text) if len(s.split()) >= _LEAST_WORDS]


def _summaries(found: Sequence[Definition]) -> list[tuple[Definition, str]]:
    seen: dict[str, Definition] = {}
    for d in found:
        summary = first_sentence(d.docstring)
        if len(summary.split()) >= _LEAST_WORDS:
            seen.setdefault(summary, d)
    return [(d, summary) for summary, d in seen.items()]


def _order(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """Two consecutive sentences of a docstring: 1 where they stand in their own order."""
    rows = []
    for d in found:
        own = sentences(d.docstring)[:2]
        if len(own) == 2:
            label = rng.randrange(2)
            first, second = own if label else own[::-1]
            rows.append({"first": first, "second": second, "label": label})
    return rows


def _package(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """A summary, and the package that it is from."""
    both = [Counter(d.package for d in definitions) for definitions in parts.values()]
    in_both = {name: min(count[name] for count in both) for name in both[0]}
    classes = sorted(in_both, key=lambda name: (-in_both[name], name))[:PACKAGES]
    return [
        {"text": summary, "label": classes.index(d.package)} for d, summary in _summaries(found) if d.package in classes
    ]


def _overlap(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """A summary, and the same with some words exchanged for another's; the label is the share that is left, times 5."""
    texts = [split_name(summary).split() for _, summary in _summaries(found)]
    rows = []
    for words in texts:
        other, changed = rng.choice(texts), list(words)
        for i in rng.sample(range(len(words)), rng.randrange(len(words) + 1)):
            changed[i] = rng.choice(other)
        left = sum(a == b for a, b in zip(words, changed, strict=True)) / len(words)
        rows.append({"first": " ".join(words), "second": " ".join(changed), "label": 5 * left})
    return rows


def _default(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """A parameter and a list of parameters; the answer is its default, none where it has none or isn't there."""
    rows = []
    nodes = [d.node for d in found if not isinstance(d.node, ast.ClassDef)]
    lists = [(node.args, defaults) for node in nodes if (defaults := _defaults(node.args))]
    names = sorted({name for _, defaults in lists for name in defaults})
    for number, (arguments, defaults) in enumerate(lists):
        context = ast.unparse(arguments)
        for name, value in defaults.items():
            start = context.index(f"{name}={value}") + len(name) + 1
            rows.append(_question(name, context, {"text": [value], "answer_start": [start]}, f"{number} {name}"))
        absent = [a.arg for a in arguments.args if a.arg not in (*defaults, "self", "cls")]
        absent += [name for name in rng.sample(names, 3) if name not in context][: max(0, len(defaults) - len(absent))]
        none: dict[str, list[Any]] = {"text": [], "answer_start": []}
        rows += [_question(name, context, none, f"{number} {name}") for name in absent[: len(defaults)]]
    return rows


def _question(name: str, context: str, answers: dict[str, list[Any]], number: str) -> dict[str, Any]:
    return {"id": number, "question": f"default of {name}", "context": context, "answers": answers}


def _defaults(arguments: ast.arguments) -> dict[str, str]:
    """The parameters that have a default without annotations, which would stand between the two."""
    positional = [*arguments.posonlyargs, *arguments.args]
    tail = positional[len(positional) - len(arguments.defaults) :]
    pairs = [*zip(tail, arguments.defaults, strict=True)]
    pairs += [(a, v) for a, v in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if v is not None]
    return {a.arg: ast.unparse(v) for a, v in pairs if a.annotation is None}


def _first_line(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """What follows a docstring's first sentence, with the signature ahead of it; and that sentence."""
    rows = []
    for d, summary in _summaries(found):
        body = " ".join(d.docstring.split())[len(summary) :].strip()
        if len(body.split()) >= _LEAST_WORDS:
            rows.append({"body": f"{split_name(d.name)} : {body}", "summary": summary})
    return rows


_Maker = Callable[[Sequence[Definition], Parts, random.Random], list[dict[str, Any]]]
_MAKERS: dict[str, _Maker] = {
    "order": _order,
    "package": _package,
    "overlap": _overlap,
    "default": _default,
    "first-line": _first_line,
}


__all__ = ["EVALUATION", "PACKAGES", "TASKS", "make", "read", "sentences"]
