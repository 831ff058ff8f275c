"""Summaries: XSum and CNN/DailyMail, from a document to a text that is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from benchmarks.paper.tasks import Task, metrics


def encode(rows: Dataset, task: Task, tokenizer: Any, length: int, target_length: int, workers: int = 1) -> Dataset:
    """The model's inputs, with the summary's tokens as ``labels``.

    Args:
        rows: of ``load``.
        task: of kind summaries.
        tokenizer: of transformers' kind.
        length, target_length: of document and summary, in tokens; what is longer is cut.
        workers: processes that share the work.
    """
    document, summary = task.texts

    def encoded(batch: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = dict(tokenizer(batch[document], truncation=True, max_length=length))
        targets = tokenizer(text_target=batch[summary], truncation=True, max_length=target_length)
        return inputs | {"labels": targets["input_ids"]}

    return rows.map(
        encoded, batched=True, remove_columns=rows.column_names, num_proc=workers if workers > 1 else None,
        desc=f"{task.title}: tokens",
    )  # fmt: skip


def lead(documents: Sequence[str], sentences: int) -> list[str]:
    """The baseline of the trade: each document's first sentences."""
    return [" ".join(metrics.sentences_of(document)[:sentences]) for document in documents]


def scores(rows: Dataset, task: Task, said: Sequence[str]) -> dict[str, float]:
    """ROUGE, in percent."""
    return metrics.of_summaries(rows[task.texts[1]], said)


__all__ = ["encode", "lead", "scores"]
