"""Answers that are a part of the context: SQuAD, in windows that overlap, with or without questions that have none.

A context that is longer than the input is cut into windows. A window that doesn't hold the answer is trained to point
at its first token, which means "none here". The answer given is the best span of all windows; where a question may have
none, "none" wins if its score, the least of all windows', exceeds that span's (Devlin et al., arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.paper.tasks import Task, metrics

BEST = 20  # starts and ends that are tried in each window
LONGEST_ANSWER = 30  # tokens


def encode(
    rows: Dataset, task: Task, tokenizer: Any, length: int, overlap: int, training: bool, workers: int = 1
) -> Dataset:
    """Windows: the model's inputs, and either the answer's positions or what ``answered`` needs.

    Args:
        rows: of ``load``.
        task: of kind answers.
        tokenizer: a fast one of transformers', that puts a special token first.
        length: of a window, question included, in tokens.
        overlap: of consecutive windows, in tokens.
        training: True for ``start_positions`` and ``end_positions`` of each row's first answer; False for ``row``, the
            number of the row, and ``offsets``, the characters of each token of the context (elsewhere [-1, -1]).
        workers: processes that share the work.

    Raises:
        ValueError: an overlap that leaves a window nothing new.
    """
    if overlap >= length:
        raise ValueError(f"overlap: expected less than the window's {length} tokens, got {overlap}")

    def encoded(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        # A question that fills the window would leave none of it to the context.
        questions = [_cut(tokenizer, question.strip(), length // 2) for question in batch["question"]]
        windows = tokenizer(
            questions, batch["context"], truncation="only_second", max_length=length, stride=overlap,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        owners, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
        of_context = [
            [tuple(span) if part == 1 else (-1, -1) for span, part in zip(spans, windows.sequence_ids(i), strict=True)]
            for i, spans in enumerate(offsets)
        ]
        features: dict[str, Any] = {name: windows[name] for name in windows}
        if not training:
            return features | {"row": [indices[owner] for owner in owners], "offsets": of_context}
        found = [_positions(batch["answers"][owner], spans) for owner, spans in zip(owners, of_context, strict=True)]
        return features | {"start_positions": [s for s, _ in found], "end_positions": [e for _, e in found]}

    return rows.map(
        encoded, batched=True, with_indices=True, remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None, desc=f"{task.title}: windows",
    )  # fmt: skip


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(encoded) <= tokens else text[: encoded[tokens - 1][1]]


def _positions(answers: dict[str, list[Any]], spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the window doesn't hold all of it."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    first = [i for i, (a, b) in enumerate(spans) if a <= start < b]
    last = [i for i, (a, b) in enumerate(spans) if a < end <= b]
    return (first[0], last[0]) if first and last else (0, 0)


def answered(task: Task, rows: Dataset, windows: Dataset, starts: Any, ends: Any) -> list[str]:
    """The answer to each row, "" for none.

    Args:
        task: says whether "none" is an answer.
        rows: of ``load``.
        windows: of ``encode`` with ``training=False``.
        starts, ends: logits, [windows, length] each; those past a window's own length are not read.
    """
    contexts = rows["context"]
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
    none = np.full(len(rows), np.inf)
    for row, spans, start, end in zip(windows["row"], windows["offsets"], starts, ends, strict=True):
        start, end = np.asarray(start)[: len(spans)], np.asarray(end)[: len(spans)]
        none[row] = min(none[row], float(start[0] + end[0]))
        in_context = [i for i, (a, _) in enumerate(spans) if a >= 0]
        firsts = sorted(in_context, key=lambda i: -start[i])[:BEST]
        lasts = sorted(in_context, key=lambda i: -end[i])[:BEST]
        for i in firsts:
            for j in lasts:
                score = float(start[i] + end[j])
                if i <= j < i + LONGEST_ANSWER and score > best[row][0]:
                    best[row] = (score, contexts[row][spans[i][0] : spans[j][1]].strip())
    return ["" if task.no_answer and none[row] > score else text for row, (score, text) in enumerate(best)]


def scores(rows: Dataset, said: Sequence[str]) -> dict[str, float]:
    """Exact match and F1, in percent."""
    return metrics.of_answers([answers["text"] for answers in rows["answers"]], said)


__all__ = ["BEST", "LONGEST_ANSWER", "answered", "encode", "scores"]
