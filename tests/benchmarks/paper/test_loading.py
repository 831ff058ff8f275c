"""The twelve tasks' rows, read from files in their real schemas; what is malformed is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from benchmarks.paper.tasks import TASKS
from benchmarks.paper.tasks.load import load

CONTEXT = "The increment is a product of three factors, and the middle one is diagonal."
ANSWER = {"text": ["diagonal"], "answer_start": [CONTEXT.index("diagonal")]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache is left alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def glue(*columns: str, labels: tuple[Any, ...] = (0, 1)) -> list[dict[str, Any]]:
    return [
        {column: f"{column} of row {i}." for column in columns} | {"label": label, "idx": i}
        for i, label in enumerate(labels)
    ]


def squad(answers: dict[str, Any] = ANSWER) -> list[dict[str, Any]]:
    return [{"id": "56be", "title": "AdaLoRA", "context": CONTEXT, "question": "What is diagonal?", "answers": answers}]


# As the data sets hold their rows on the hub, columns that are not read included.
ROWS: dict[str, list[dict[str, Any]]] = {
    "mnli": glue("premise", "hypothesis", labels=(0, 1, 2)),
    "sst2": glue("sentence"),
    "cola": glue("sentence"),
    "qqp": glue("question1", "question2"),
    "qnli": glue("question", "sentence"),
    "rte": glue("sentence1", "sentence2"),
    "mrpc": glue("sentence1", "sentence2"),
    "stsb": glue("sentence1", "sentence2", labels=(0.0, 3.75)),
    "squad": squad(),
    "squad_v2": squad({"text": [], "answer_start": []}),
    "xsum": [{"document": "A long text. With more.", "summary": "A text.", "id": "29"}],
    "cnn_dailymail": [{"article": "A long text. With more.", "highlights": "A text .\nMore .", "id": "f0"}],
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)


def folder(path: Path, name: str, ending: str, rows: list[dict[str, Any]] | None = None) -> Path:
    for split in ("train", *TASKS[name].evaluation):
        write(path / f"{split}{ending}", ROWS[name] if rows is None else rows)
    return path


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_every_tasks_rows(name: str, ending: str, tmp_path: Path) -> None:
    task = TASKS[name]
    splits = load(task, folder(tmp_path, name, ending))
    assert set(splits) == {"train", *task.evaluation}
    for rows in splits.values():
        assert rows.column_names == list(task.columns)
        assert [dict(row) for row in rows] == [{c: row[c] for c in task.columns} for row in ROWS[name]]


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("squad")])
def test_csv(name: str, tmp_path: Path) -> None:
    rows = load(TASKS[name], folder(tmp_path, name, ".csv"))["train"]
    assert [dict(row) for row in rows] == [{c: row[c] for c in TASKS[name].columns} for row in ROWS[name]]


def test_single_files(tmp_path: Path) -> None:
    paths = {"train": tmp_path / "some.csv", "validation": tmp_path / "other.parquet"}
    for path in paths.values():
        write(path, ROWS["rte"])
    assert [len(rows) for rows in load(TASKS["rte"], paths).values()] == [2, 2]


def test_squads_own_files(tmp_path: Path) -> None:
    question = {"id": "56be", "question": "What is diagonal?", "answers": [
        {"text": text, "answer_start": start} for text, start in zip(*ANSWER.values(), strict=True)]}  # fmt: skip
    impossible = {"id": "5ad3", "question": "What is square?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": CONTEXT, "qas": [question, impossible]}]
    for split in ("train", "validation"):
        content = {"version": "v2.0", "data": [{"title": "AdaLoRA", "paragraphs": paragraphs}]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    rows = load(TASKS["squad_v2"], tmp_path)["train"]
    assert rows["answers"][:] == [ANSWER, {"text": [], "answer_start": []}]
    with pytest.raises(ValueError, match="squad, train, row 1: answers: expected at least one, got none"):
        load(TASKS["squad"], tmp_path)


MALFORMED = [
    ("rte", {"sentence2": None}, "rte, train, row 0: sentence2: expected text, got None"),
    ("rte", {"sentence2": "  "}, "rte, train, row 0: sentence2: expected text"),
    ("rte", {"label": 2}, "label: expected one of 0 to 1, got 2"),
    ("rte", {"label": -1}, "label: expected one of 0 to 1, got -1"),
    ("mnli", {"label": "entailment"}, "label: expected one of 0 to 2, got 'entailment'"),
    ("stsb", {"label": None}, "label: expected a number, got None"),
    ("squad", {"answers": {"text": ["diagonal"], "answer_start": [3]}}, "expected 'diagonal' at 3 of the context"),
    ("squad", {"answers": {"text": ["diagonal"], "answer_start": []}}, "expected as many of answer_start as of text"),
    ("squad", {"answers": "diagonal"}, "answers: expected a mapping of text and answer_start"),
    ("xsum", {"document": ""}, "xsum, train, row 0: document: expected text, got ''"),
]


@pytest.mark.parametrize(("name", "change", "message"), MALFORMED)
def test_malformed_rows_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [row | change for row in ROWS[name]]
    with pytest.raises(ValueError, match=message):
        load(TASKS[name], folder(tmp_path, name, ".json", rows))


def test_missing_columns_are_named(tmp_path: Path) -> None:
    rows = [{"premise": "a", "label": 0}]
    with pytest.raises(
        ValueError, match="mnli, train: expected the columns premise, hypothesis, label; missing: hypothesis"
    ):
        load(TASKS["mnli"], folder(tmp_path, "mnli", ".json", rows))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "found no folder nowhere"),
        ({"train": "nowhere.json"}, ValueError, "expected a file for each of train, validation, got train"),
        ({"train": "nowhere.json", "validation": "n.json"}, FileNotFoundError, r"source\['train'\]: no file nowhere"),
    ],
)
def test_sources_that_are_not_there(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(TASKS["rte"], source)


def test_folders_and_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected one of train.json, .* found none"):
        load(TASKS["rte"], tmp_path)
    folder(tmp_path, "rte", ".json")
    folder(tmp_path, "rte", ".csv")
    with pytest.raises(FileNotFoundError, match=r"found train.json, train.csv"):
        load(TASKS["rte"], tmp_path)
    (tmp_path / "train.tsv").write_text("a\tb")
    with pytest.raises(ValueError, match=r"expected a file that ends in .*, got train.tsv"):
        load(TASKS["rte"], {"train": tmp_path / "train.tsv", "validation": tmp_path / "validation.json"})


@pytest.mark.parametrize("content", ["", "{ half", '["a", "b"]'])
def test_files_that_are_cut_off(content: str, tmp_path: Path) -> None:
    folder(tmp_path, "rte", ".json")
    (tmp_path / "validation.json").write_text(content)
    with pytest.raises(ValueError, match=r"rte|validation\.json"):
        load(TASKS["rte"], tmp_path)


def test_an_unreachable_hub_is_said_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"rte: the hub's nyu-mll/glue can't be read .*; give --data a folder with train.json"
    ):
        load(TASKS["rte"], "hub")
