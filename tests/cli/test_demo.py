"""The demo from end to end at a small size, and what makes it fail."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from adalora_kernels import patch_model
from adalora_kernels.cli.demo import run as demo
from adalora_kernels.cli.demo.accuracy import estimate
from adalora_kernels.cli.demo.model import PairEncoder, deberta_v3_config
from adalora_kernels.cli.demo.report import Outcome, rank_map_of, table
from adalora_kernels.cli.demo.settings import MATRICES, Settings
from adalora_kernels.cli.demo.train import PHASES, Contender, batches, with_adapter
from adalora_kernels.cli.main import main
from adalora_kernels.cli.rank_map import as_text


def small(output: Path, **changes: object) -> Settings:
    settings = Settings(
        output=output,
        sources=Path(sysconfig.get_path("stdlib")) / "asyncio",
        steps=6,
        base_steps=3,
        base_batch=8,
        batch=8,
        hidden_size=64,
        layers=2,
        vocabulary=400,
        max_length=12,
        least_accuracy=0.4,
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return demo.train_and_judge(small(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def trained(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``run`` report the outcome that there is, under the settings that it is given."""
    monkeypatch.setattr(demo, "train_and_judge", lambda settings: replace(outcome, settings=settings))


@pytest.mark.usefixtures("trained")
def test_run_writes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path)
    assert demo.run(settings) == 0
    printed = capsys.readouterr().out
    picture = settings.output / "ranks.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert str(picture) in printed
    assert (settings.output / "table.txt").read_text(encoding="utf-8") in printed


@pytest.mark.usefixtures("trained")
def test_a_failing_run_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(small(tmp_path, least_accuracy=1.01)) == 1
    assert "FAILED: held-out accuracy" in capsys.readouterr().out


def test_command_line_reaches_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []
    monkeypatch.setattr(demo, "run", lambda settings: asked.append(settings) or 0)
    arguments = ["demo", "--steps", "12", "--seed", "7", "--output", str(tmp_path), "--backend", "reference"]
    assert main(arguments) == 0
    assert asked == [Settings(output=tmp_path, steps=12, seed=7, backend="reference")]


def test_both_trainings_agree_and_reach_the_budget(outcome: Outcome) -> None:
    settings = outcome.settings
    assert outcome.loss_difference < 1e-5
    for contender in (outcome.peft, outcome.ours):
        assert len(contender.losses) == len(contender.task_losses) == settings.steps
        assert all(total > task for total, task in zip(contender.losses, contender.task_losses, strict=True))
        assert set(contender.live_ranks()) == {(layer, m) for layer in range(2) for m in MATRICES.values()}
        assert sum(contender.live_ranks().values()) == settings.target_budget == 48
        assert all(len(spans) == settings.steps for spans in contender.milliseconds.values())
        assert all(span > 0 for spans in contender.milliseconds.values() for span in spans)
    assert outcome.failures() == []


def test_table_holds_every_figure(outcome: Outcome) -> None:
    text = table(outcome)
    for word in ("PEFT / ours", "loss", "held-out accuracy", "ms per step", "majority 50.0 %", *PHASES):
        assert word in text
    assert f"base {estimate(outcome.base)}" in text
    assert max(map(len, text.splitlines()[:12])) < 100


def test_no_gain_is_claimed_inside_two_standard_errors(outcome: Outcome) -> None:
    noise = torch.randn(len(outcome.base), dtype=torch.float64)
    noise -= noise.mean()
    for shift, verdict in ((0.0, "no gain is claimed"), (1.0, "points, a gain."), (-1.0, "points, a loss.")):
        assert verdict in table(replace(outcome, ours_correct=outcome.base + shift + noise))


def test_ranks_in_the_terminal(outcome: Outcome) -> None:
    lines = as_text(rank_map_of(outcome.ours, outcome.settings), width=80).splitlines()
    assert len(lines) == 2 + len(MATRICES)
    numbers = [int(word) for line in lines[2:] for word in line.split() if word.isdigit()]
    assert sum(numbers) == outcome.settings.target_budget


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_accuracy": 1.01}, "accuracy"),
        ({"tolerance": -1.0}, "losses differ"),
        ({"target_rank": 3}, "is left with 48 triplets, the budget is 36"),
    ],
)
def test_failures_are_named(outcome: Outcome, changes: dict[str, float], message: str) -> None:
    failures = replace(outcome, settings=replace(outcome.settings, **changes)).failures()  # type: ignore[arg-type]
    assert failures and all(message in failure for failure in failures)


def test_nan_fails(outcome: Outcome) -> None:
    broken = replace(outcome, ours_correct=outcome.base * float("nan"))
    assert len(broken.failures()) == 1


def test_batches_are_the_same_each_time_and_cover_everything() -> None:
    first = list(batches(10, 3, 7, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, batches(10, 3, 7, seed=1), strict=True))
    assert len(set(torch.cat(first[:3]).tolist())) == 9
    with pytest.raises(ValueError, match="at most the 10 training pairs, got 11"):
        next(batches(10, 11, 1, seed=0))


@pytest.mark.parametrize("patched", [False, True])
def test_adapters_start_alike_and_the_term_runs_backward_first(tmp_path: Path, patched: bool) -> None:
    """The attribution of the orthogonality term's time: its backward ends before the task's begins."""
    settings = small(tmp_path)
    base = PairEncoder(deberta_v3_config(50, 64, 2, 12))
    model, twin = with_adapter(base, settings), with_adapter(base, settings)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b) and a is not b, name
    if patched:
        patch_model(model)
    contender = Contender("x", model, settings)
    ids = torch.randint(2, 50, (8, 12))
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_loss=True).loss
    task, term = (node for node, _ in loss.grad_fn.next_functions)
    events: list[str] = []
    task.register_prehook(lambda _: events.append("task"))
    pending, seen = [term], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node.name() == "torch::autograd::AccumulateGrad":
            continue
        seen.add(node)
        node.register_hook(lambda *_: events.append("term"))
        pending.extend(next_node for next_node, _ in node.next_functions)
    loss.backward()
    assert events == ["term"] * len(seen) + ["task"]
    assert contender._marks.task_backward > contender._marks.inner_end > 0
