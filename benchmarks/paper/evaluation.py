"""What a trained model scores on a task, and what has to be beaten without any training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer

from benchmarks.paper.tasks import (
    ANSWERS,
    CLASSIFICATION,
    NATS,
    REGRESSION,
    SUMMARIES,
    Task,
    answers,
    metrics,
    sentences,
)
from benchmarks.paper.tasks import summaries as summary_task

IGNORED = -100  # what the Trainer pads labels and predictions with


def scores(task: Task, trainer: Trainer, rows: Dataset, features: Dataset) -> dict[str, float]:
    """The task's metrics in percent, and for summaries the nats per token of the reference.

    Args:
        task: what is judged.
        trainer: holds the model, the tokenizer and the collator; for summaries a ``Seq2SeqTrainer`` that generates.
        rows: of one split.
        features: what ``encode`` made of them; for answers with ``training=False``.
    """
    if task.kind == SUMMARIES:
        # Where several processes generate, the last batch is filled up with rows that were there before.
        said = trainer.predict(features).predictions[: len(rows)]
        tokenizer: Any = trainer.processing_class
        texts = tokenizer.batch_decode(
            np.where(said == IGNORED, tokenizer.pad_token_id, said), skip_special_tokens=True
        )
        return summary_task.scores(rows, task, texts) | {NATS: nats_per_token(trainer, features)}
    predictions = trainer.predict(features).predictions
    if task.kind == ANSWERS:
        starts, ends = predictions[:2]
        return answers.scores(rows, answers.answered(task, rows, features, starts, ends))
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return sentences.scores(task, logits, rows["label"])


@torch.no_grad()
def nats_per_token(trainer: Trainer, features: Dataset) -> float:
    """Mean of -log p over all tokens of the references, with the right tokens before each; over all processes."""
    model: Any = trainer.model
    model.eval()
    nats, tokens = [], []
    for batch in trainer.get_eval_dataloader(features):
        with trainer.accelerator.autocast():
            logits = model(**batch).logits
        labels = batch["labels"]
        of_each = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        sums = trainer.accelerator.gather_for_metrics((of_each.sum(1), (labels != IGNORED).sum(1)))
        nats.append(sums[0])
        tokens.append(sums[1])
    return float(torch.cat(nats).sum() / torch.cat(tokens).sum())


def baselines(task: Task, training: Dataset, rows: Dataset, tokens: Sequence[Sequence[int]] = ()) -> dict[str, float]:
    """What needs no model: the most frequent class, a constant, no answer or a document's first sentence.

    Args:
        task: what is judged.
        training, rows: the split to learn from and the one to be judged by.
        tokens: for summaries, the labels of ``training`` and then those of ``rows``, for a unigram model.
    """
    if task.kind == CLASSIFICATION:
        most = Counter(training["label"]).most_common(1)[0][0]
        return metrics.of_labels(task.metrics, rows["label"], [most] * len(rows))
    if task.kind == REGRESSION:
        return metrics.of_labels(task.metrics, rows["label"], [float(np.mean(training["label"]))] * len(rows))
    if task.kind == ANSWERS:
        return answers.scores(rows, [""] * len(rows))
    lead = summary_task.scores(rows, task, summary_task.lead(rows[task.texts[0]], 1))
    return lead | {NATS: _unigram(tokens[: len(training)], tokens[len(training) :])} if tokens else lead


def _unigram(training: Sequence[Sequence[int]], judged: Sequence[Sequence[int]]) -> float:
    """Nats per token under the training tokens' frequencies, with one count added to every token that occurs at all."""
    count = Counter(token for row in training for token in row)
    for token in {token for row in (*training, *judged) for token in row}:
        count[token] += 1
    total = sum(count.values())
    nats = [-math.log(count[token] / total) for row in judged for token in row]
    return sum(nats) / len(nats)


__all__ = ["baselines", "nats_per_token", "scores"]
