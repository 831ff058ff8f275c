"""The paper's metrics, each in percent, from the libraries that keep them; SQuAD's exact match and F1 are our own.

SQuAD's normalisation (lower case, no punctuation, no articles, one blank) is that of its authors' evaluation, arXiv
1606.05250; an unanswerable question counts as right where nothing is answered (arXiv 1806.03822).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

OF_LABELS = {
    "accuracy": accuracy_score,
    "f1_of_positives": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda truth, said: pearsonr(truth, said).statistic,
    "spearman": lambda truth, said: spearmanr(truth, said).statistic,
}


def of_labels(names: Sequence[str], truth: Any, said: Any) -> dict[str, float]:
    """Metrics of classes or numbers.

    Args:
        names: of ``OF_LABELS``.
        truth, said: [n] each. Where all that was said is the same, a correlation is 0.
    """
    constant = np.ptp(np.asarray(said, dtype=float)) == 0
    return {
        name: 0.0 if constant and name in ("pearson", "spearman") else 100 * float(OF_LABELS[name](truth, said))
        for name in names
    }


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def token_f1(truth: str, said: str) -> float:
    """F1 of the words that two answers share, in [0, 1]."""
    wanted, given = normalised(truth).split(), normalised(said).split()
    if not wanted or not given:
        return float(wanted == given)
    shared = sum((Counter(wanted) & Counter(given)).values())
    return 2 * shared / (len(wanted) + len(given))


def of_answers(truths: Sequence[Sequence[str]], said: Sequence[str]) -> dict[str, float]:
    """Exact match and F1, each against the best of a question's answers; no answers means that none is right."""
    exact, f1 = [], []
    for answers, answer in zip(truths, said, strict=True):
        candidates = [text for text in answers if normalised(text)] or [""]
        exact.append(max(float(normalised(truth) == normalised(answer)) for truth in candidates))
        f1.append(max(token_f1(truth, answer) for truth in candidates))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def of_summaries(truth: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1, with stemming; -L over a summary's sentences (rougeLsum), as the papers report it."""
    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(_by_line(a), _by_line(b)) for a, b in zip(truth, said, strict=True)]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def sentences_of(text: str) -> list[str]:
    """A text, cut behind full stops, exclamation and question marks."""
    return _SENTENCE_END.split(text.strip())


def _by_line(text: str) -> str:
    return "\n".join(sentences_of(text))


__all__ = ["OF_LABELS", "normalised", "of_answers", "of_labels", "of_summaries", "sentences_of", "token_f1"]
