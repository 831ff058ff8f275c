"""Small tasks of each kind, made from the standard library's docstrings, for machines without the hub.

Modules are dealt to training and evaluation, so that no module is in both, except for the task "package".
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from adalora_kernels.cli.demo.text import Definition, dealt, definitions, first_sentence, split_name
from benchmarks.paper.standin import PACKAGES, STAND_INS
from benchmarks.paper.tasks import TRAINING

EVALUATION = "validation"
MOST_ROWS = {  # to learn from and to be judged by: minutes for all methods and seeds
    "order": (2400, 400),
    "package": (2400, 800),
    "overlap": (1200, 400),
    "purpose": (1600, 400),
    "first-line": (1000, 150),
}
_SHARES = {TRAINING: 0.75, EVALUATION: 0.25}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LEAST_WORDS = 4
BLOT = "something"  # in place of a word
_PURPOSE = re.compile(r"((?!\bfor\b).)*\bfor (?P<purpose>\w[^.,;:()]*\w)(?!\w)((?!\bfor\b).)*")  # one "for" alone
_EXAMPLE = ">>>"  # a docstring that begins with code has no summary

Parts = dict[str, list[Definition]]


def read(root: Path | None = None) -> Parts:
    """Every documented definition below ``root`` (None: the standard library), dealt to training and evaluation."""
    found = list(definitions(root))
    part_of = dealt(Counter(d.module for d in found), _SHARES)
    return {part: [d for d in found if part_of[d.module] == part] for part in _SHARES}


def make(name: str, parts: Parts, seed: int = 0) -> dict[str, Dataset]:
    """The rows of one stand-in, as ``tasks.load`` would give them.

    Args:
        name: of ``STAND_INS``.
        parts: of ``read``.
        seed: of what is drawn; not the seed of a training.
    """
    make_rows = _MAKERS[name]
    made = {}
    for part, found in parts.items():
        rows = make_rows(found, parts, random.Random(f"{seed} {part}"))
        random.Random(seed).shuffle(rows)
        most = MOST_ROWS[name][part == EVALUATION]
        made[part] = Dataset.from_list(rows[:most]).select_columns(list(STAND_INS[name].columns))
    return made


def sentences(docstring: str) -> list[str]:
    """A docstring's sentences, each on one line, without those of fewer than four words."""
    text = " ".join(docstring.split())
    return [s for s in _SENTENCE_END.split(text) if len(s.split()) >= _LEAST_WORDS]


def _summaries(found: Sequence[Definition]) -> list[tuple[Definition, str]]:
    seen: dict[str, Definition] = {}
    for d in found:
        summary = first_sentence(d.docstring)
        if len(summary.split()) >= _LEAST_WORDS and _EXAMPLE not in summary:
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
    """A summary, and the package that it is from; dealt by summaries, since most packages are few modules."""
    summaries = _summaries([d for definitions in parts.values() for d in definitions])
    classes = [name for name, _ in Counter(d.package for d, _ in summaries).most_common(PACKAGES)]
    share = round(1 / _SHARES[EVALUATION])
    return [
        {"text": summary, "label": classes.index(d.package)}
        for i, (d, summary) in enumerate(summaries)
        if d.package in classes and (i % share == 0) == (found is parts[EVALUATION])
    ]


def _overlap(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """A summary, and the same with some words blotted out; the label is the share that is left, times 5."""
    rows = []
    for _, summary in _summaries(found):
        words = split_name(summary).split()
        left = list(words)
        for i in rng.sample(range(len(words)), rng.randrange(len(words) + 1)):
            left[i] = BLOT
        rows.append({"first": " ".join(words), "second": " ".join(left), "label": 5 - 5 * left.count(BLOT) / len(left)})
    return rows


def _purpose(found: Sequence[Definition], parts: Parts, rng: random.Random) -> list[dict[str, Any]]:
    """A summary; the answer is what stands between "for" and the next punctuation, none where there is no "for".

    One question is asked of all: to find a question's word in the context is more than the small base learns.
    """
    summaries = [summary for _, summary in _summaries(found)]
    there = [(summary, match) for summary in summaries if (match := _PURPOSE.fullmatch(summary))]
    absent = [summary for summary in summaries if "for" not in re.findall(r"\w+", summary.lower())]
    rows = [
        {"context": summary, "answers": {"text": [match["purpose"]], "answer_start": [match.start("purpose")]}}
        for summary, match in there
    ]
    rows += [
        {"context": summary, "answers": {"text": [], "answer_start": []}}
        for summary in rng.sample(absent, min(len(there), len(absent)))
    ]
    return [{"id": str(number), "question": "for what ?"} | row for number, row in enumerate(rows)]


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
    "purpose": _purpose,
    "first-line": _first_line,
}


__all__ = ["EVALUATION", "Parts", "make", "read", "sentences"]
