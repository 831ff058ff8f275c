"""README states what the committed records say, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.readme import BEGIN, END, replaced, section
from tests.benchmarks.test_report import ABOUT, GPU, folder_of, gpu_content, layer, step

README = Path(__file__).parents[2] / "README.md"


# A measured figure in prose: a number, in digits or words, with a unit or with what it compares.
FIGURE = re.compile(
    r"(?:\d[\d.,]*|\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|hundred|half))\s*"
    r"(?:×|%|[mµn]s\b|[MG]i?B\b|times\b|fold\b|(?:\w+ )?(?:operators|launches)\b|percent\b)",
    re.IGNORECASE,
)


def test_section_is_made_from_the_records() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == replaced(text, section()), "run: python -m benchmarks.readme"


def test_prose_has_no_figure_of_its_own() -> None:
    text = README.read_text(encoding="utf-8")
    own = text.partition(BEGIN)[0] + text.partition(END)[2]
    prose = re.sub(r"```.*?```|`[^`]*`", "", own, flags=re.DOTALL)
    assert not FIGURE.findall(prose), (
        "measured figures belong to benchmarks/readme.py, which reads them off the records"
    )
    for faulty in ("ten times less", "some 88 small operators", "1.5× a copy", "takes 3 ms", "5 % more", "12 MiB"):
        assert FIGURE.search(faulty), faulty


def test_section_with_and_without_steps(tmp_path: Path) -> None:
    layers = {"environment": ABOUT, "records": [layer(), step(1.5)]}
    said = section(folder_of(tmp_path, cpu=layers))
    assert "| 768×768 | 1024 | float32 | 2 | 1.070 | 1.300 | 1.130 | 1.047 | ±1.0% |" in said
    assert "| BART, small | 8×64 | 12 | float32 | 2 | 33 (0.90) | 33 (0.80) | 33 | 33 | 33 | ±2.0% |" in said
    assert "All of it holds." in said and "Nothing has been timed on a GPU yet." in said
    said = section(folder_of(tmp_path, cpu={"environment": ABOUT, "records": [layer()]}))
    assert "training step, ms" not in said
    with_gpu = folder_of(tmp_path, **{"a-gpu": gpu_content(GPU)})
    said = section(with_gpu)
    assert "By `make gpu` on a GPU (`benchmarks/results/a-gpu.json`): 3 bounds hold, 1 are missed" in said
    assert (
        "| Forward / bare F.linear: at most 1.08 at 4096² and wider, 1.20 below | 1.10 to 1.30 | 1 held, 1 missed |"
        in said
    )
    assert "| Importance alone / a copy of its bytes: at most 1.3 |  | 1 open |" in said
    assert "| Gradients: bitwise repeatable, like every other check of correctness |  | held |" in said


def test_section_names_misses(tmp_path: Path) -> None:
    said = section(folder_of(tmp_path, cpu={"environment": ABOUT, "records": [step(0.8)]}))
    assert "* Training step, BART, small, 8 sequences" in said and "ours takes 1.250 of PEFT AdaLoRA's time." in said
    with pytest.raises(ValueError, match="expected a record of make bench"):
        section(folder_of(tmp_path / "other", other={"environment": ABOUT, "records": [layer()]}))


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_original_api_example_runs() -> None:
    code = next(c for c in examples() if "RankAllocator" in c)
    space: dict[str, Any] = {"batches": [(torch.randn(4, 768), torch.randn(4, 768)) for _ in range(2)]}
    exec(code, space)
    assert space["allocator"].global_step == 1 and space["budget"] == 24


def test_peft_example_runs(monkeypatch: Any) -> None:
    """As printed, but for the model: a small configuration in place of a download."""
    import transformers

    def small(name: str) -> Any:
        config = transformers.DebertaV2Config(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8,
        )  # fmt: skip
        return transformers.DebertaV2ForSequenceClassification(config)

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", small)
    code = next(c for c in examples() if "patch_model" in c)
    batch = {"input_ids": torch.randint(0, 99, (2, 7)), "labels": torch.tensor([0, 1])}
    space: dict[str, Any] = {"batches": [batch] * 2}
    exec(code, space)
    assert space["step"] == 1
    # The next example goes on with that model.
    exec(next(c for c in examples() if "AdaLoraAdamW" in c), space)
    assert space["allocator"].next_step == 4 and space["optimizer"].max_grad_norm == 1.0
