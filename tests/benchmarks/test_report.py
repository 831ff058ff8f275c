"""The page holds what the records say, each figure with its origin, and nothing of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import page, verdicts
from benchmarks.report.__main__ import RESULTS
from benchmarks.report.draw import Axes, Bar, Group, bars
from benchmarks.report.sources import read_folder
from benchmarks.report.verdicts import HELD, MISSED, OPEN
from benchmarks.report.wording import labels, number

ABOUT = {"device": "a CPU", "cores": 2, "commit": "0123456789ab", "python": "3.11", "torch": "2.13", "peft": "0.20"}
GPU = {"device": "a GPU", "capability": "9.0", "commit": "ba9876543210", "python": "3.11", "torch": "2.13"}
LAYER = {"K": 768, "N": 768, "M": 1024, "R": 12, "dtype": "float32", "threads": 2}
STEP = {"model": "BART, small", "rows": 8, "columns": 64, "R": 12, "dtype": "float32", "threads": 2, "device": "cpu"}
PHASES = {"forward": 10.0, "backward": 20.0, "optimizer": 1.0, "budget engine": 2.0}
CONTESTANTS = ("PEFT AdaLoRA", "ours", "ours, AdaLoraAdamW", "PEFT LoRA", "full fine-tuning")


def times(**by: float) -> dict[str, dict[str, float]]:
    return {name: {"median": t, "p20": 0.99 * t, "p80": 1.01 * t} for name, t in by.items()}


def layer(benchmark: str = "layer forward + backward", **case: Any) -> dict[str, Any]:
    ratios = {"frozen": 1.0, "ours": 1.07, "peft": 1.3, "addmm_": 1.13}
    return {
        "benchmark": benchmark, "case": LAYER | case, "milliseconds": times(**{c: 25 * r for c, r in ratios.items()}),
        "ratio_to_frozen": ratios, "flop_floor": 1.047, "noise": 0.01, "rounds": 5,
    }  # fmt: skip


def step(ratio: float = 1.5, noise: float = 0.02) -> dict[str, Any]:
    return {
        "benchmark": "training step", "case": STEP, "rounds": 5, "noise": noise,
        "milliseconds": times(**dict.fromkeys(CONTESTANTS, 33.0)), "phases": dict.fromkeys(CONTESTANTS, PHASES),
        "peft_over_ours": {"ours": ratio, "ours, AdaLoraAdamW": ratio},
        "ours_over_lora": {"ours": 0.9, "ours, AdaLoraAdamW": 0.8},
        "saved_bytes": dict.fromkeys(CONTESTANTS, 3 << 20),
    }  # fmt: skip


def graphed(refused: str = "PEFT AdaLoRA") -> dict[str, Any]:
    contestants = ("frozen model", "PEFT LoRA", "ours", "ours, AdaLoraAdamW", "PEFT AdaLoRA, eager")
    return {
        "benchmark": "training step, CUDA graph", "case": STEP | {"lora": 8, "mode": "CUDA graph"}, "rounds": 5,
        "milliseconds": times(**dict.fromkeys(contestants, 9.0)), "ours_over_lora": {"ours": 0.9},
        "eager_peft_over_ours": {"ours": 3.4}, "noise": 0.01, "not_captured": {refused: "RuntimeError: it waits"},
        "peak_bytes": dict.fromkeys(contestants, 5 << 20),
    }  # fmt: skip


def records() -> list[dict[str, Any]]:
    """One of each kind that make bench writes, or as many as make a curve."""
    engine = {
        "benchmark": "importance + masking + orthogonality", "rounds": 5,
        "case": {"matrices": 72, "R": 12, "threads": 2},
        "milliseconds": times(**{"AdamW alone": 3.0, "PEFT": 37.0, "ours": 8.0, "ours, AdaLoraAdamW": 6.0}),
        "added_milliseconds": {"PEFT": 34.0, "ours": 5.0, "ours, AdaLoraAdamW": 3.0},
        "peft_over_ours": {"ours": 6.8, "ours, AdaLoraAdamW": 11.3},
    }  # fmt: skip
    parts = [
        {
            "benchmark": "budget engine by number of layers", "rounds": 5, "importance_to_copy": 1.9,
            "case": {"model": "256x256", "layers": n, "R": 12, "elements": 6156 * n, "threads": 2},
            "milliseconds": times(**{"importance, native": 0.02 * n, "copy": 0.01 * n}),
            "microseconds_per_layer": {"importance": {"native": 20.0, "reference": 150.0}},
        }
        for n in (12, 72)
    ]  # fmt: skip
    backward = {
        "benchmark": "importance in a backward", "case": LAYER | {"layers": 24}, "rounds": 5,
        "milliseconds": times(**{"backward alone": 49.0, "launched": 50.0, "fused": 51.0}),
        "added_to_backward": {"launched": {"median": 0.5, "p20": -0.3, "p80": 1.6}, **times(fused=2.3)},
    }  # fmt: skip
    operators = {
        "benchmark": "operators of a training step", "case": STEP, "saved_bytes": dict.fromkeys(CONTESTANTS, 3 << 20),
        "operators": {c: {"forward": 100, "backward": 200, "step": 300} for c in CONTESTANTS},
    }  # fmt: skip
    unknown = {"benchmark": "something new", "case": {}, "milliseconds": times(one=1.0, other=2.0), "rounds": 5}
    curve = [layer("layer by tokens", M=m) for m in (64, 256, 1024)]
    return [layer(), layer(N=3072), engine, *parts, backward, step(), graphed(), operators, unknown, *curve]


def folder_of(path: Path, **files: Any) -> Path:
    """A folder of records."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the page."""
    results = folder_of(
        tmp_path_factory.mktemp("results"),
        cpu={"environment": ABOUT, "absent": {"Liger": "it has no such layer"}, "records": records()},
        broken={"environment": {}, "records": []},
    )
    return page.write(results, tmp_path_factory.mktemp("page")).parent


def test_every_kind_of_record_has_its_figures(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    for title in (
        "Speed-up: Layer forward + backward", "Layer forward + backward, ", "Against tokens: Layer by tokens",
        "Roofline: Layer forward + backward", "Importance + masking + orthogonality", "Importance in a backward",
        "Importance against the copy floor", "BART, small, 8 sequences", "Saved for the backward",
        "Operators: BART, small", "Something new", "Peak of a step",
    ):  # fmt: skip
        assert f"<h3>{title}" in text, title
    figures = text.count("<figure>")
    assert text.count("cpu.json, commit 0123456789ab, a CPU, 2 cores, make bench</p>") == figures
    plots = list((written / "plots").glob("*.png"))
    assert len(plots) == figures and all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    assert len(re.findall(r'<img [^>]*alt="[^"]{40,}', text)) == figures
    assert "2 threads, LoRA&#39;s rank 8, CUDA graph</h3>" in text
    told = "PEFT AdaLoRA, eager, takes 3.40× of ours; ours takes 0.90× of PEFT LoRA; noise ±1.0%."
    assert f"{told} Not PEFT AdaLoRA: RuntimeError: it waits." in text
    assert "Left out: broken.json, environment: expected device" in text
    assert "Not among the contestants: Liger" in text


def test_misses_and_open_rows_are_told(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'class="state open"', text)) == len(verdicts.TARGETS) + 1
    assert "Every bound of make bench holds." in text


def test_no_committed_file_is_left_out() -> None:
    sources, left_out = read_folder(RESULTS)
    assert left_out == {} and {"cpu.json", "teacher.json"} <= {source.file for source in sources}
    assert not any("does not name" in origin.command for source in sources for origin in source.origins)


def test_equal_records_give_equal_pages(written: Path, tmp_path: Path) -> None:
    results = folder_of(tmp_path / "results", cpu={"environment": ABOUT, "records": [layer(), step()]})
    first, second = (page.write(results, tmp_path / name).read_text(encoding="utf-8") for name in "ab")
    assert first == second


def test_ratios_inside_the_noise_are_marked(tmp_path: Path) -> None:
    def text(ratio: float, noise: float) -> str:
        results = folder_of(tmp_path / "results", cpu={"environment": ABOUT, "records": [step(ratio, noise)]})
        return page.write(results, tmp_path / "page").read_text(encoding="utf-8")

    assert "1.02× (≈, inside the noise) of ours" in text(1.02, 0.03)
    assert "1.05× of ours" in text(1.05, 0.03)


def test_noise_is_the_spread_where_nothing_was_timed_twice(tmp_path: Path) -> None:
    record = layer()
    del record["noise"]
    (source,), _ = read_folder(folder_of(tmp_path, cpu={"environment": ABOUT, "records": [record]}))
    assert source.measured[0].noise("ours") == pytest.approx(0.01)


def test_cpu_misses_are_sentences(tmp_path: Path) -> None:
    slow = layer()
    slow["ratio_to_frozen"]["ours"] = 1.2
    sources, _ = read_folder(folder_of(tmp_path, cpu={"environment": ABOUT, "records": [slow, step(0.9)]}))
    found = list(verdicts.on_cpu(sources))
    assert {verdict.state for verdict in found} == {MISSED} and len(found) == 4
    assert found[0].said.startswith("Layer, 768×768, 1024 tokens, rank 12, float32, 2 threads: 1.200 of the frozen")


def gpu_content(about: dict[str, Any]) -> dict[str, Any]:
    row = {"name": "forward, 768x768, bfloat16 adapter: ours / frozen", "bound": 1.2, "at_least": False}
    forward = layer("layer") | {"direction": "forward"}
    return {
        "environment": about, "records": [forward], "checks": [], "checks_held": 9,
        "rows": [
            row | {"figure": 1.1}, row | {"figure": 1.3}, row | {"name": "another: ours / it", "figure": 1.0},
            row | {"name": "a step: ours / PEFT LoRA r=8, training step, CUDA graph", "figure": None},
        ],
    }  # fmt: skip


def test_gpu_rows_are_held_missed_or_open(tmp_path: Path) -> None:
    sources, _ = read_folder(folder_of(tmp_path, **{"a-gpu": gpu_content(GPU)}))
    found = list(verdicts.on_gpu(sources))
    assert [v.state for v in found[:2]] == [HELD, MISSED] and found[1].said.endswith(
        "is 1.30, more than the 1.2 it may be."
    )
    assert [v.state for v in found].count(OPEN) == len(verdicts.TARGETS) - 1
    assert found[-2].said == "Another: ours / it is 1.00, at most 1.2."
    assert found[-1].state == HELD and str(found[-1].origin) == "a-gpu.json, commit ba9876543210, a GPU, make gpu"


def test_checks_are_held_missed_or_open(tmp_path: Path) -> None:
    """Open where all were skipped, as on a machine without the tool."""
    skipped = {"name": "memcheck", "outcome": "skipped"}
    content = {"environment": GPU, "records": [{"benchmark": "compute-sanitizer", "case": {"tool": "memcheck"}}]}

    def state(held: int, *checks: dict[str, str]) -> str:
        of = content | {"checks": list(checks), "checks_held": held}
        sources, _ = read_folder(folder_of(tmp_path, **{"a-gpu-sanitizer": of}))
        (verdict,) = [v for v in verdicts.on_gpu(sources) if v.said.startswith(verdicts.SANITIZED)]
        return verdict.state

    assert state(0, skipped) == OPEN and state(4) == HELD and state(3, skipped | {"outcome": "FAILED"}) == MISSED


def test_a_dry_run_proves_nothing(tmp_path: Path) -> None:
    results = folder_of(tmp_path / "results", dry=gpu_content(ABOUT | {"dry": True}))
    sources, _ = read_folder(results)
    assert {v.state for v in verdicts.on_gpu(sources)} == {OPEN}
    assert "no figure of theirs means anything" in page.write(results, tmp_path / "page").read_text(encoding="utf-8")


def test_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--results: expected a folder of records, .*nowhere is none"):
        page.write(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match=r"--results: expected records, .* holds none; make bench"):
        page.write(folder_of(tmp_path / "empty"), tmp_path)
    (tmp_path / "file").touch()
    results = folder_of(tmp_path / "results", cpu={"environment": ABOUT, "records": [step()]})
    with pytest.raises(ValueError, match=r"--output: expected a folder, .*file is a file"):
        page.write(results, tmp_path / "file")


def test_words() -> None:
    assert labels([LAYER, LAYER | {"M": 4096}]) == ["1024 tokens", "4096 tokens"] and labels([LAYER]) == [""]
    assert [number(x) for x in (0.012, 1.234, 12.34, 12345.6)] == ["0.012", "1.23", "12.3", "12\u202f346"]


def test_plots_follow_the_theme() -> None:
    svg = bars([Group("", [Bar("ours", 1.0, "ours")])], Axes("ms"), line=1.0).svg
    assert "var(--blue)" in svg and "prefers-color-scheme:dark" in svg and "#0072b2" not in svg.partition("</style>")[2]
