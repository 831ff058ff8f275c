"""The models that whole steps are timed on: small configurations for a CPU, the real ones for a GPU; random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.step.names import DEBERTA

VOCABULARY = 2000  # embeddings take no part in what is compared


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model and what it is fed.

    Attributes:
        name: for people and records.
        build: makes it.
        targets: the matrices that are adapted: all of attention and of the feed-forward part.
        rows, columns: of a batch, in sequences and tokens.
        labels: "class" for one number a sequence, "tokens" for one a token.
    """

    name: str
    build: Callable[[], nn.Module]
    targets: str
    rows: int
    columns: int
    labels: str

    def batch(self, device: str, seed: int) -> Batch:
        """Random tokens, equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCABULARY, (self.rows, self.columns), generator=generator)
        labels = torch.randint(2, (self.rows,), generator=generator) if self.labels == "class" else tokens
        return {"input_ids": tokens.to(device), "labels": labels.to(device)}


_DEBERTA_TARGETS = r".*(query_proj|key_proj|value_proj|attention\.output\.dense|intermediate\.dense|\d\.output\.dense)"
_BART_TARGETS = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_T5_TARGETS = r".*\.(q|k|v|o|wi|wo)"
_LLAMA_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def _deberta(hidden: int, layers: int, longest: int) -> nn.Module:
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden, type_vocab_size=0, relative_attention=True, position_buckets=longest // 2,
            max_position_embeddings=longest, norm_rel_ebd="layer_norm", share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_biased_input=False, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _bart(hidden: int, layers: int, longest: int) -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=hidden, encoder_layers=layers, decoder_layers=layers,
            encoder_attention_heads=hidden // 64, decoder_attention_heads=hidden // 64, encoder_ffn_dim=4 * hidden,
            decoder_ffn_dim=4 * hidden, max_position_embeddings=longest, dropout=0.0,
        )
    )  # fmt: skip


def _t5(hidden: int, layers: int) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=hidden, d_kv=64, d_ff=4 * hidden, num_layers=layers,
            num_heads=hidden // 64, dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _llama(hidden: int, wide: int, layers: int, heads: int, key_heads: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=4096,
        )
    )  # fmt: skip


SMALL = (
    Model("DeBERTa-v3, 4 layers of 256", lambda: _deberta(256, 4, 128), _DEBERTA_TARGETS, 8, 64, "class"),
    Model("BART, 2 + 2 layers of 256", lambda: _bart(256, 2, 128), _BART_TARGETS, 8, 64, "tokens"),
    Model("T5, 2 + 2 layers of 256", lambda: _t5(256, 2), _T5_TARGETS, 8, 64, "tokens"),
    Model("Llama, 4 layers of 256", lambda: _llama(256, 688, 4, 4, 2), _LLAMA_TARGETS, 8, 64, "tokens"),
)
DRY = Model("DeBERTa-v3, 1 layer of 64", lambda: _deberta(64, 1, 32), _DEBERTA_TARGETS, 2, 8, "class")
REAL = (
    Model(DEBERTA, lambda: _deberta(768, 12, 512), _DEBERTA_TARGETS, 32, 128, "class"),
    Model("DeBERTa-v3-base, 16×384", lambda: _deberta(768, 12, 512), _DEBERTA_TARGETS, 16, 384, "class"),
    Model("BART-large, 16×512", lambda: _bart(1024, 12, 1024), _BART_TARGETS, 16, 512, "tokens"),
    Model("T5-base, 16×512", lambda: _t5(768, 12), _T5_TARGETS, 16, 512, "tokens"),
    Model("Llama, 1B, 4×1024", lambda: _llama(2048, 8192, 16, 32, 8), _LLAMA_TARGETS, 4, 1024, "tokens"),
    Model("Llama, one block of 8B, 4×2048", lambda: _llama(4096, 14336, 1, 32, 8), _LLAMA_TARGETS, 4, 2048, "tokens"),
)


def described(model: Model, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """The case, as it is written down."""
    return {
        "model": model.name, "rows": model.rows, "columns": model.columns, "R": rank,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


__all__ = ["DRY", "REAL", "SMALL", "Batch", "Model", "described"]
