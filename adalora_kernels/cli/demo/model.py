"""A small DeBERTa-v3 that embeds signatures and summaries with one encoder, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel
from transformers.utils import ModelOutput

from adalora_kernels.cli.demo.text import Pair, split_name

PAD, UNKNOWN = "[PAD]", "[UNK]"
_TEMPERATURE = 0.1


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """A byte-pair tokenizer trained on ``texts``; it pads to the longest text and cuts at ``max_length`` tokens.

    Word starts are marked as in DeBERTa-v3's own tokenizer. Models that mark the insides of words instead (WordPiece)
    train to another vocabulary in every process.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    tokenizer.enable_truncation(max_length)
    return tokenizer


def texts_of(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The signatures and the summaries, both with identifiers cut into words."""
    return [pair.signature for pair in pairs], [split_name(pair.summary) for pair in pairs]


@dataclass(frozen=True)
class EncodedPairs:
    """Token numbers of n pairs.

    Attributes:
        ids: int64 [2, n, L]; signatures, then summaries.
        mask: int64 [2, n, L], 1 where there is a token.
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.ids.shape[1]

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The model's inputs for the pairs ``index`` [B]: [2B, longest], signatures before summaries."""
        ids, mask = self.ids[:, index].flatten(0, 1), self.mask[:, index].flatten(0, 1)
        longest = int(mask.sum(1).max())
        return {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], device: str) -> EncodedPairs:
    """Both texts of every pair as token numbers on ``device``."""
    signatures, summaries = texts_of(pairs)
    encoded = tokenizer.encode_batch(signatures + summaries)
    ids, mask = (torch.tensor([getattr(e, name) for e in encoded], device=device) for name in ("ids", "attention_mask"))
    return EncodedPairs(ids.unflatten(0, (2, len(pairs))), mask.unflatten(0, (2, len(pairs))))


@dataclass
class PairOutput(ModelOutput):
    """What :class:`PairEncoder` returns.

    Attributes:
        loss: 0-d contrastive loss, where it was asked for.
        embeddings: [2B, hidden], of unit length.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class PairEncoder(DebertaV2PreTrainedModel):
    """One encoder for both texts: mean of the last hidden states, cosine scores, the batch's others as negatives."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_loss: bool = False, **_: object) -> PairOutput:
        """Embed [2B, L] tokens, signatures before summaries; with ``return_loss`` the two halves are matched."""
        hidden = self.deberta(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        embeddings = F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
        loss = None
        if return_loss:
            signatures, summaries = embeddings.chunk(2)
            scores = signatures @ summaries.t() / _TEMPERATURE
            target = torch.arange(len(scores), device=scores.device)
            loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2
        return PairOutput(loss=loss, embeddings=embeddings)


def deberta_v3_config(vocab_size: int, hidden_size: int, layers: int, max_length: int) -> DebertaV2Config:
    """DeBERTa-v3's settings at a small size, without dropout, so that two trainings can be compared loss by loss.

    As in microsoft/deberta-v3-base: disentangled attention c2p and p2c with shared keys, log-bucketed relative
    positions under a layer norm, no absolute positions, no token types, heads of 64, a feed-forward of four times the
    width. The buckets cover ``max_length`` in place of 512 tokens.
    """
    return DebertaV2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=2 * max_length,
        position_buckets=max_length,
        relative_attention=True,
        max_relative_positions=-1,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        pad_token_id=0,
    )


__all__ = [
    "EncodedPairs",
    "PairEncoder",
    "PairOutput",
    "deberta_v3_config",
    "encode_pairs",
    "texts_of",
    "train_tokenizer",
]
