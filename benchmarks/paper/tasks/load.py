"""A task's rows from the hub, a folder or single files, checked row by row before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from benchmarks.paper.tasks import ANSWERS, CLASSIFICATION, REGRESSION, TRAINING, Task

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load(task: Task, source: str | Path | Mapping[str, str | Path], cache: Path | None = None) -> dict[str, Dataset]:
    """The rows that a task trains on and those that it is judged by.

    Args:
        task: what is expected.
        source: "hub"; a folder with a file for each split, such as ``train.json`` (or .jsonl, .csv, .parquet); or for
            each split a file. SQuAD's own nested JSON is read as well as the hub's flat one.
        cache: folder for what was downloaded and converted; None for that of the datasets library.

    Returns:
        For "train" and each of ``task.evaluation`` the rows, with ``task.columns`` and no others.

    Raises:
        FileNotFoundError: a folder or file that isn't there.
        ValueError: a file of another kind, a missing column, a row that is not as the task says, named.
        RuntimeError: the hub can't be reached, or has no such data.
    """
    splits = (TRAINING, *task.evaluation)
    if source == "hub":
        raw = _from_hub(task, splits, cache)
    else:
        files = _files_of(source, splits) if isinstance(source, str | Path) else _named(source, splits)
        raw = {split: _read(task, path, cache) for split, path in files.items()}
    return {split: _checked(task, rows, where=split) for split, rows in raw.items()}


def _from_hub(task: Task, splits: tuple[str, ...], cache: Path | None) -> dict[str, Dataset]:
    if task.hub is None:
        raise ValueError(f"source: {task.name} is not on the hub; it is made by benchmarks.paper.standin")
    repository, configuration = task.hub
    try:
        return {
            split: datasets.load_dataset(repository, configuration, split=split, cache_dir=cache) for split in splits
        }
    except (OSError, datasets.exceptions.DatasetsError) as error:  # the hub's and requests' errors are OSErrors
        raise RuntimeError(
            f"{task.name}: the hub's {repository} can't be read ({type(error).__name__}: {error}); "
            f"give --data a folder with {', '.join(f'{split}.json' for split in splits)} instead"
        ) from error


def _files_of(source: str | Path, splits: tuple[str, ...]) -> dict[str, Path]:
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"source: expected 'hub' or a folder, found no folder {folder}")
    files = {}
    for split in splits:
        found = [folder / f"{split}{ending}" for ending in READERS if (folder / f"{split}{ending}").is_file()]
        if len(found) != 1:
            which = "none" if not found else ", ".join(path.name for path in found)
            raise FileNotFoundError(
                f"source: expected one of {', '.join(split + ending for ending in READERS)} in {folder}, found {which}"
            )
        files[split] = found[0]
    return files


def _named(source: Mapping[str, str | Path], splits: tuple[str, ...]) -> dict[str, Path]:
    if set(source) != set(splits):
        raise ValueError(f"source: expected a file for each of {', '.join(splits)}, got {', '.join(source) or 'none'}")
    for split, path in source.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"source[{split!r}]: no file {path}")
    return {split: Path(path) for split, path in source.items()}


def _read(task: Task, path: Path, cache: Path | None) -> Dataset:
    if path.suffix not in READERS:
        raise ValueError(f"source: expected a file that ends in {', '.join(READERS)}, got {path.name}")
    if not path.stat().st_size:
        raise ValueError(f"source: expected rows in {path}, found an empty file")
    if task.kind == ANSWERS and path.suffix == ".json" and (nested := _nested_squad(path)) is not None:
        return Dataset.from_list(nested)
    try:
        loaded = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"source: {path} can't be read as {READERS[path.suffix]}: {cause}") from error
    assert isinstance(loaded, Dataset)
    return loaded


def _nested_squad(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file as SQuAD's authors distribute it: {"data": [{"paragraphs": [{"context", "qas"}]}]}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # JSON lines, or no JSON at all: the general reader says which
    if not isinstance(content, dict) or "data" not in content:
        return None
    try:
        return [
            {
                "id": str(question["id"]),
                "question": question["question"],
                "context": paragraph["context"],
                "answers": {
                    "text": [answer["text"] for answer in question["answers"]],
                    "answer_start": [answer["answer_start"] for answer in question["answers"]],
                },
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"source: {path} is not as SQuAD's files are: {error!r}") from error


def _checked(task: Task, rows: Dataset, where: str) -> Dataset:
    missing = [column for column in task.columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{task.name}, {where}: expected the columns {', '.join(task.columns)}; missing: {', '.join(missing)}; "
            f"found {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ValueError(f"{task.name}, {where}: expected rows, found none")
    rows = rows.select_columns(list(task.columns))
    for i, row in enumerate(rows):
        for complaint in _complaints(task, row):
            raise ValueError(f"{task.name}, {where}, row {i}: {complaint}")
    return rows


def _complaints(task: Task, row: Mapping[str, Any]) -> Iterator[str]:
    for column in task.texts:
        if not isinstance(row[column], str) or not row[column].strip():
            yield f"{column}: expected text, got {row[column]!r:.60}"
    if task.kind == CLASSIFICATION:
        if type(row["label"]) is not int or not 0 <= row["label"] < task.classes:
            yield f"label: expected one of 0 to {task.classes - 1}, got {row['label']!r:.60}"
    elif task.kind == REGRESSION:
        if not isinstance(row["label"], int | float) or row["label"] != row["label"]:
            yield f"label: expected a number, got {row['label']!r:.60}"
    elif task.kind == ANSWERS:
        yield from _answer_complaints(task, row)


def _answer_complaints(task: Task, row: Mapping[str, Any]) -> Iterator[str]:
    answers = row["answers"]
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
        yield f"answers: expected a mapping of text and answer_start, got {answers!r:.60}"
        return
    texts, starts = answers["text"], answers["answer_start"]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        yield f"answers: expected as many of answer_start as of text, got {starts!r:.40} and {texts!r:.40}"
        return
    if not texts and not task.no_answer:
        yield "answers: expected at least one, got none"
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or row["context"][start : start + len(text)] != text:
            yield f"answers: expected {text!r:.40} at {start} of the context, found it not there"


__all__ = ["READERS", "load"]
