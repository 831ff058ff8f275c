"""TRL builds the PEFT model itself, so ``patch_peft`` comes first; its reference is that model without its adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from adalora_kernels.integrations.peft import layer_report, patch_peft, unpatch_peft
from adalora_kernels.integrations.svd_layer import FusedSVDLinear
from adalora_kernels.integrations.trainer import AdaLoraCallback
from tests.integrations.one_layer import fused_calls as fused_calls

pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

STEPS = 6
WORDS = [f"w{i}" for i in range(30)]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
            bos_token_id=None,
        )
    )  # fmt: skip


def _sentence(generator: torch.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


def _rows(kind: str) -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    if kind == "SFT":
        return Dataset.from_list([{"text": _sentence(g, 6)} for _ in range(16)])
    return Dataset.from_list(
        [{"prompt": _sentence(g, 3), "chosen": _sentence(g, 3), "rejected": _sentence(g, 3)} for _ in range(16)]
    )


def _trained(kind: str, folder: Path) -> Trainer:
    """Trained as TRL's users do; the model is handed over as transformers made it."""
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 0, "disable_tqdm": True, "logging_steps": 1,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "bf16": False, "max_length": 16,
    }  # fmt: skip
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, total_step=STEPS, tinit=1, tfinal=2, lora_alpha=12,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], orth_reg_weight=0.1,
    )  # fmt: skip
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    trainer = trainer_class(
        model=_model(), args=config_class(**options), train_dataset=_rows(kind), processing_class=_tokenizer(),
        peft_config=config, callbacks=[AdaLoraCallback()],
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_the_same_training_patched_and_unpatched(kind: str, tmp_path: Path, fused_calls: list[str]) -> None:
    theirs = _trained(kind, tmp_path / "theirs")
    assert not fused_calls
    patch_peft()
    ours = _trained(kind, tmp_path / "ours")
    unpatch_peft()
    layers = [m for m in ours.model.modules() if isinstance(m, FusedSVDLinear)]
    assert len(layers) == len(layer_report(ours.model)) == 4 and len(fused_calls) == STEPS * len(layers)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (theirs, ours)]
    assert len(losses[0]) == STEPS and losses[1] == pytest.approx(losses[0], rel=1e-3)
    patterns = [t.model.peft_config["default"].rank_pattern for t in (theirs, ours)]
    assert patterns[0] == patterns[1] and sum(map(sum, patterns[1].values())) == 2 * len(layers)


def test_the_reference_is_the_model_without_its_adapter(tmp_path: Path, fused_calls: list[str]) -> None:
    patch_peft()
    model = _trained("DPO", tmp_path).model.eval()
    fused_calls.clear()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad(), model.disable_adapter():
        logits: Tensor = model(input_ids=tokens).logits
    assert not fused_calls
    base: Callable[..., Any] = _model().eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, base(input_ids=tokens).logits)
        assert not torch.allclose(model(input_ids=tokens).logits, logits)
    assert len(fused_calls) == 4
