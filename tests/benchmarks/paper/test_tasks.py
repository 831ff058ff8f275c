"""Inputs and metrics of each kind of task, on cases whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerFast

from benchmarks.paper.standin.tokenizer import train_tokenizer
from benchmarks.paper.tasks import TASKS, answers, metrics, sentences, summaries

WORDS = "the middle factor of three is diagonal and its entries are pruned by importance until a budget is met"
CONTEXT = f"{WORDS}. {WORDS.title()}. The answer is hidden here, behind all else."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([WORDS, CONTEXT, "what is it?"], 200, 64)


@pytest.mark.parametrize(
    ("truth", "said", "exact", "f1"),
    [
        (["the diagonal"], "Diagonal.", 100, 100),
        (["a diagonal matrix"], "diagonal", 0, 100 * 2 / 3),
        (["one", "two words"], "two words", 100, 100),
        ([], "", 100, 100),
        ([], "something", 0, 0),
        (["something"], "", 0, 0),
        (["the"], "", 100, 100),  # nothing is left of it
        (["b b c"], "b c c", 0, 100 * 2 / 3),
    ],
)
def test_exact_match_and_f1(truth: list[str], said: str, exact: float, f1: float) -> None:
    assert metrics.of_answers([truth], [said]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_metrics_of_labels() -> None:
    truth, said = [0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1]
    found = metrics.of_labels(("accuracy", "f1_of_positives", "matthews"), truth, said)
    assert found == {name: pytest.approx(v) for name, v in (
        ("accuracy", 100 * 4 / 6), ("f1_of_positives", 100 * 2 / 3), ("matthews", 100 / 3))}  # fmt: skip
    assert metrics.of_labels(("pearson", "spearman"), [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == {"pearson": 0, "spearman": 0}
    numbers = [0.1, 5.0, 2.2, 3.0], [0.0, 9.0, 3.0, 1.0]
    found = metrics.of_labels(("pearson", "spearman"), *numbers)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(*numbers)[0, 1])
    assert found["spearman"] == pytest.approx(100 * spearmanr(*numbers).statistic) == pytest.approx(80)


def test_rouge() -> None:
    same = metrics.of_summaries(["The rank is pruned. It ends."], ["the rank is pruned. it ends."])
    assert same == {"rouge1": 100, "rouge2": 100, "rougeLsum": 100}
    # Two of three words in common on both sides, one pair of neighbours of two; stems count ("prunes", "pruned").
    found = metrics.of_summaries(["it pruned ranks"], ["it prunes columns"])
    assert found == {
        name: pytest.approx(v) for name, v in (("rouge1", 200 / 3), ("rouge2", 50), ("rougeLsum", 200 / 3))
    }
    # Sentences in another order: the whole text's longest common subsequence would be half of it.
    assert metrics.of_summaries(["One two. Three four."], ["Three four. One two."])["rougeLsum"] == 100


@pytest.mark.parametrize("name", ["rte", "sst2", "stsb"])
def test_sentences(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS[name]
    rows = Dataset.from_list([{c: f"{WORDS} {c}" for c in task.texts} | {"label": label} for label in (1, 0)])
    encoded = sentences.encode(rows, task, tokenizer, 16)
    assert {"input_ids", "attention_mask", "labels"} <= set(encoded.column_names)
    assert not set(encoded.column_names) & set(task.columns)
    assert encoded["labels"][:] == [1, 0] and type(encoded["labels"][0]) is (float if name == "stsb" else int)
    assert all(len(ids) == 16 and ids[0] == tokenizer.cls_token_id for ids in encoded["input_ids"])


def test_scores_of_sentences() -> None:
    logits = [[0.1, 0.9], [2.0, -1.0], [0.3, 0.2], [0.0, 1.0]]
    assert sentences.scores(TASKS["rte"], logits, [1, 0, 1, 1]) == {"accuracy": 75}
    assert sentences.scores(TASKS["stsb"], [[1.0], [2.0], [3.0]], [0.0, 2.5, 5.0])["pearson"] == pytest.approx(100)


QUESTIONS = [
    {"id": "0", "question": "what is pruned?", "context": CONTEXT,
     "answers": {"text": ["entries"], "answer_start": [CONTEXT.index("entries")]}},
    {"id": "1", "question": "where is the answer?", "context": CONTEXT,
     "answers": {"text": ["hidden here"], "answer_start": [CONTEXT.index("hidden here")]}},
    {"id": "2", "question": "who is it?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]  # fmt: skip


def logits_for(rows: Dataset, windows: Dataset) -> tuple[list[Any], list[Any]]:
    """What a model that knows every first answer, and where there is none, would say."""
    starts, ends = [], []
    for row, spans in zip(windows["row"], windows["offsets"], strict=True):
        start, end = np.zeros(len(spans)), np.zeros(len(spans))
        begun, last = answers._positions(rows[row]["answers"], spans)
        start[begun], end[last] = 9, 9
        starts.append(start)
        ends.append(end)
    return starts, ends


@pytest.mark.parametrize("length", [24, 40, 400])
def test_answers_survive_the_windows(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    task, rows = TASKS["squad_v2"], Dataset.from_list(QUESTIONS)
    windows = answers.encode(rows, task, tokenizer, length, 8, training=False)
    assert set(windows["row"]) == {0, 1, 2} and (len(windows) > 3) == (length < 400)
    assert max(map(len, windows["input_ids"])) <= length
    said = answers.answered(task, rows, windows, *logits_for(rows, windows))
    assert said == ["entries", "hidden here", ""]
    assert answers.scores(rows, said) == {"exact_match": 100, "f1": 100}


@pytest.mark.parametrize("length", [24, 400])
def test_training_windows_point_at_the_answer(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(QUESTIONS)
    windows = answers.encode(rows, TASKS["squad_v2"], tokenizer, length, 8, training=True)
    spans = zip(windows["input_ids"], windows["start_positions"], windows["end_positions"], strict=True)
    said = [tokenizer.decode(ids[start : end + 1]).strip() for ids, start, end in spans if start]
    assert set(said) == {"entries", "hidden here"}
    assert sum(start == 0 for start in windows["start_positions"]) >= 1


def test_the_best_span_is_legal_and_none_can_win(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(QUESTIONS[:1])
    windows = answers.encode(rows, TASKS["squad_v2"], tokenizer, 400, 8, training=False)
    spans = windows["offsets"][0]
    inside = [i for i, (a, _) in enumerate(spans) if a >= 0]
    start, end = np.zeros((1, len(spans))), np.zeros((1, len(spans)))
    start[0, inside[5]], end[0, inside[3]] = 5, 5  # an end ahead of its start
    end[0, inside[6]] = 0.5
    start[0, 1] = end[0, 1] = 50  # in the question
    said = answers.answered(TASKS["squad"], rows, windows, start, end)[0]
    assert said == CONTEXT[spans[inside[5]][0] : spans[inside[6]][1]].strip()
    start[0, 0] = end[0, 0] = 6
    assert answers.answered(TASKS["squad_v2"], rows, windows, start, end) == [""]
    assert answers.answered(TASKS["squad"], rows, windows, start, end) == [said]


def test_a_question_longer_than_the_window_leaves_room(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list([QUESTIONS[0] | {"question": WORDS * 3}])
    windows = answers.encode(rows, TASKS["squad"], tokenizer, 32, 8, training=False)
    assert all(any(a >= 0 for a, _ in spans) for spans in windows["offsets"])
    with pytest.raises(ValueError, match="overlap: expected less than the window's 32 tokens, got 32"):
        answers.encode(rows, TASKS["squad"], tokenizer, 32, 32, training=False)


def test_summaries(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list([{"document": CONTEXT, "summary": WORDS}])
    encoded = summaries.encode(rows, TASKS["xsum"], tokenizer, 20, 8)
    assert len(encoded["input_ids"][0]) == 20 and len(encoded["labels"][0]) == 8
    assert summaries.lead([CONTEXT], 1) == [f"{WORDS}."]
    assert summaries.scores(rows, TASKS["xsum"], [WORDS])["rouge1"] == 100
