"""README states what the committed records say, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.readme import load, replaced, table

README = Path(__file__).parents[2] / "README.md"


def test_table_is_made_from_the_records() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == replaced(text, table(load())), "run: python -m benchmarks.readme"


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
