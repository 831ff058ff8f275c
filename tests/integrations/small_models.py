"""Small random transformers under PEFT's AdaLoRA, and a training loop that patched and unpatched models share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from adalora_kernels.integrations.guidance import infer_task_type
from adalora_kernels.integrations.peft import patch_model

VOCABULARY = 61
IMAGE, MEL_BINS, FRAMES, CLASSES = 16, 8, 12, 3
ARCHITECTURES = ("deberta", "llama", "gpt2")
ALL_ARCHITECTURES = (*ARCHITECTURES, "t5", "bart", "vit", "whisper")


def _deberta(layers: int) -> tuple[nn.Module, str, list[str]]:
    config = DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config), "SEQ_CLS", ["query_proj", "key_proj", "value_proj", "dense"]


def _llama(layers: int) -> tuple[nn.Module, str, list[str]]:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config), "CAUSAL_LM", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def _gpt2(layers: int) -> tuple[nn.Module, str, list[str]]:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"]


def _t5(layers: int) -> tuple[nn.Module, str | None, list[str]]:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_decoder_layers=layers, num_heads=4,
        relative_attention_num_buckets=8, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return model, infer_task_type(model), ["q", "k", "v", "o", "wi", "wo"]


def _bart(layers: int) -> tuple[nn.Module, str | None, list[str]]:
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    return model, infer_task_type(model), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def _vit(layers: int) -> tuple[nn.Module, None, list[str]]:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, image_size=IMAGE,
        patch_size=IMAGE // 2, num_labels=CLASSES,
    )  # fmt: skip
    # PEFT has no task type for images and for speech.
    return ViTForImageClassification(config), None, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def _whisper(layers: int) -> tuple[nn.Module, None, list[str]]:
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=MEL_BINS, d_model=32, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=FRAMES, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), None, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class Perceptron(nn.Module):
    """Three linear layers whose loss is in the dtype of the weights (transformers' losses are in fp32 at best)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def _perceptron(layers: int) -> tuple[nn.Module, None, list[str]]:
    return Perceptron(), None, ["first", "second", "third"]


_BUILDERS: dict[str, Callable[[int], tuple[nn.Module, str | None, list[str]]]] = {
    "deberta": _deberta,
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "whisper": _whisper,
    "perceptron": _perceptron,
}


def build(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    adapter: str = "default",
    layers: int = 2,
    autocast_adapter_dtype: bool = True,
    **settings: Any,
) -> PeftModel:
    """A small random model under AdaLoRA with E ≠ 0 and ranknum frozen, in training mode."""
    torch.manual_seed(seed)
    model, task_type, targets = _BUILDERS[architecture](layers)
    options = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 20,
               "target_modules": targets, "task_type": task_type, "orth_reg_weight": 0.1}  # fmt: skip
    config = AdaLoraConfig(**{**options, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by PEFT for Conv1D
        peft_model = get_peft_model(
            model.to(dtype), config, adapter_name=adapter, autocast_adapter_dtype=autocast_adapter_dtype
        )
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in peft_model.named_parameters():
        if "lora_E" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if "ranknum" in name:
            parameter.requires_grad_(False)  # PEFT 0.21 lets it drift over bases that are not in fp32
    return peft_model.train()


def batch(model: nn.Module, seed: int = 0, rows: int = 3, columns: int = 7) -> dict[str, Tensor]:
    """Random inputs of the kind that the model takes, with labels that fit its task."""
    generator = torch.Generator().manual_seed(seed)
    inner = model.get_base_model()
    if isinstance(inner, Perceptron):
        x = torch.randn(16, 12, generator=generator, dtype=inner.first.base_layer.weight.dtype)
        return {"x": x, "labels": x[:, :4].argmax(1)}
    if inner.main_input_name == "pixel_values":
        images = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator).to(inner.dtype)
        return {"pixel_values": images, "labels": torch.randint(CLASSES, (rows,), generator=generator)}
    tokens = torch.randint(1, VOCABULARY, (rows, columns), generator=generator)
    if inner.main_input_name == "input_features":
        sound = torch.randn(rows, MEL_BINS, 2 * FRAMES, generator=generator).to(inner.dtype)
        return {"input_features": sound, "labels": tokens}
    classifies = "SequenceClassification" in type(inner).__name__
    return {"input_ids": tokens, "labels": torch.randint(2, (rows,), generator=generator) if classifies else tokens}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int, *, start: int = 0, lr: float = 1e-2, allocate: bool = True) -> list[float]:
    """Steps of AdamW with the allocator after each; the losses.

    By way of the AdaLoRA model: where there is no task type, PEFT adds its orthogonality term there alone.
    """
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = model.base_model(**batch(model, seed=step)).loss
        loss.backward()
        optimizer.step()
        if allocate:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def twins(model: PeftModel, **options: Any) -> tuple[PeftModel, PeftModel]:
    """An unpatched and a patched copy of ``model``."""
    return copy.deepcopy(model), patch_model(copy.deepcopy(model), **options)


def pattern(model: PeftModel, adapter: str = "default") -> Any:
    """A copy of the adapter's rank pattern."""
    return copy.deepcopy(model.peft_config[adapter].rank_pattern)


def live_total(model: PeftModel) -> int:
    """How many triplets live, by the rank pattern."""
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every E."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_E" in name}


def backward(model: PeftModel, seed: int = 0) -> None:
    """Gradients of one batch alone."""
    model.zero_grad()
    model(**batch(model, seed)).loss.backward()
