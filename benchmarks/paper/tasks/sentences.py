"""Classes and numbers of one sentence or two: GLUE."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.paper.tasks import REGRESSION, Task, metrics


def encode(rows: Dataset, task: Task, tokenizer: Any, length: int, workers: int = 1) -> Dataset:
    """The model's inputs, with ``labels``.

    Args:
        rows: of ``load``.
        task: of kind classification or regression.
        tokenizer: of transformers' kind.
        length: longest input, in tokens; what is longer is cut.
        workers: processes that share the work.
    """

    def encoded(batch: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = dict(tokenizer(*(batch[column] for column in task.texts), truncation=True, max_length=length))
        labels = batch["label"]
        return inputs | {"labels": [float(v) for v in labels] if task.kind == REGRESSION else labels}

    return rows.map(
        encoded, batched=True, remove_columns=rows.column_names, num_proc=workers if workers > 1 else None,
        desc=f"{task.title}: tokens",
    )  # fmt: skip


def scores(task: Task, logits: Any, labels: Any) -> dict[str, float]:
    """The task's metrics, in percent, of logits [n, classes] against labels [n]."""
    logits = np.asarray(logits)
    said = logits.reshape(-1) if task.kind == REGRESSION else logits.argmax(-1)
    return metrics.of_labels(task.metrics, np.asarray(labels), said)


__all__ = ["encode", "scores"]
