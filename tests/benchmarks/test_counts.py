"""Operators and bytes of a training step are those that are on record; times are left to ``make bench``."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from benchmarks.compare import changes
from benchmarks.records import read
from benchmarks.step import counts, models, names

HELD = read(counts.RESULTS)
ABOUT = HELD["environment"]


@pytest.mark.parametrize("model", models.SMALL, ids=lambda model: model.name.split(",")[0])
def test_no_more_operators_and_bytes_than_on_record(model: models.Model) -> None:
    other = [name for name in counts.DECISIVE if version(name).partition("+")[0] != ABOUT[name].partition("+")[0]]
    if other:
        pytest.skip(f"on record for other versions of {', '.join(other)}: python -m benchmarks.step.counts")
    threads = torch.get_num_threads()
    try:
        now = counts.count(model)
    finally:
        torch.set_num_threads(threads)
    (held,) = (record for record in HELD["records"] if record["case"] == now["case"])
    found = list(changes({"records": [held]}, {"records": [now]}))
    assert len(found) == 12 and not [str(change) for change in found if change.worse]
    assert now["operators"] == held["operators"], "fewer, or others's changed: python -m benchmarks.step.counts"
    step = {name: by["step"] for name, by in now["operators"].items()}
    assert step[names.OURS] < step[names.LORA] < step[names.PEFT] / 3
