"""Small pretrained models for the stand-ins: a DeBERTa-v3 and a BART, trained on the training modules' docstrings.

The encoder learns to fill in masked tokens of two texts, which are consecutive sentences or twice the same one under
other masks, so that it learns to look from one text into the other; the decoder learns to restore a text from which
spans were cut out (BART's own objective). What was trained is kept in a folder and taken from there the next time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2ForMaskedLM,
    PreTrainedTokenizerFast,
)

from adalora_kernels.cli.demo.model import deberta_v3_config
from adalora_kernels.cli.demo.text import split_name
from benchmarks.paper.standin.rows import Parts, sentences
from benchmarks.paper.standin.tokenizer import train_tokenizer
from benchmarks.paper.tasks import TRAINING

IGNORED = -100  # a label that no loss counts
KINDS = ("encoder", "decoder")
MASKED_SHARE = 0.3


@dataclass(frozen=True)
class BaseSettings:
    """Sizes of both models, and how they are trained.

    Attributes:
        hidden, layers: width and number of layers; BART has so many in its encoder and in its decoder.
        vocabulary, longest: tokens that there are, and tokens of one input.
        steps, batch, learning_rate: of the training; the rate falls to 0 in a line after a tenth of the steps.
        seed: of initial weights, order and masks.
    """

    hidden: int = 128
    layers: int = 3
    vocabulary: int = 4000
    longest: int = 48
    steps: int = 800
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0

    @classmethod
    def of(cls, kind: str) -> BaseSettings:
        """Those of the stand-ins' bases."""
        return cls() if kind == "encoder" else cls(layers=2, steps=500)


@dataclass(frozen=True)
class Text:
    """What the bases are trained on, of the training modules alone.

    Attributes:
        docstrings: the sentences of each.
        names: of all definitions, as words.
    """

    docstrings: list[list[str]]
    names: list[str]

    @classmethod
    def of(cls, parts: Parts) -> Text:
        """That of ``rows.read``."""
        own = parts[TRAINING]
        return cls([sentences(d.docstring) for d in own], [split_name(d.name) for d in own])


def pretrained(kind: str, text: Text, settings: BaseSettings, folder: Path) -> Path:
    """The folder of a base model and its tokenizer, as ``from_pretrained`` reads it; trained where it isn't there yet.

    Args:
        kind: "encoder" (DeBERTa-v3) or "decoder" (BART).
        text: what it is trained on.
        settings: sizes and training.
        folder: holds one folder for each kind, settings and text.
    """
    told = sha256(repr((kind, asdict(settings), asdict(text))).encode()).hexdigest()[:12]
    place = folder / f"{kind}-{told}"
    if (place / "config.json").is_file():
        return place
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(
        [*(s for own in text.docstrings for s in own), *text.names], settings.vocabulary, settings.longest
    )
    corpus = [own for own in text.docstrings if own]
    batches = _batches(kind, corpus, tokenizer, settings)
    model = _encoder(settings) if kind == "encoder" else _decoder(settings, tokenizer)
    _train(model, batches, settings, f"base: {kind}")
    unfinished = place.with_suffix(".unfinished")
    inner: Any = model.deberta if kind == "encoder" else model
    inner.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(place)
    return place


def _encoder(settings: BaseSettings) -> nn.Module:
    return DebertaV2ForMaskedLM(
        deberta_v3_config(settings.vocabulary, settings.hidden, settings.layers, settings.longest)
    )


def _decoder(settings: BaseSettings, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    heads, wide = max(1, settings.hidden // 64), 4 * settings.hidden
    config = BartConfig(
        vocab_size=settings.vocabulary, d_model=settings.hidden, max_position_embeddings=2 * settings.longest,
        encoder_layers=settings.layers, decoder_layers=settings.layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=wide, decoder_ffn_dim=wide, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id, forced_eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def _train(model: nn.Module, batches: Iterator[dict[str, Tensor]], settings: BaseSettings, title: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))
    )
    bar = tqdm(range(settings.steps), desc=title)
    for _ in bar:
        loss = model(**next(batches)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def _batches(
    kind: str, corpus: Sequence[Sequence[str]], tokenizer: Any, settings: BaseSettings
) -> Iterator[dict[str, Tensor]]:
    rng = random.Random(settings.seed)
    while True:
        chosen = rng.choices(corpus, k=settings.batch)
        yield (_masked if kind == "encoder" else _cut)(chosen, tokenizer, settings, rng)


def _masked(
    chosen: Sequence[Sequence[str]], tokenizer: Any, settings: BaseSettings, rng: random.Random
) -> dict[str, Tensor]:
    """Two texts with masked tokens: consecutive sentences, or twice the same one."""
    firsts, seconds = [], []
    for own in chosen:
        at = rng.randrange(len(own))
        firsts.append(own[at])
        seconds.append(own[at] if at + 1 == len(own) or rng.random() < 0.5 else own[at + 1])
    inputs = tokenizer(
        firsts, seconds, truncation=True, max_length=settings.longest, padding=True, return_tensors="pt",
        return_special_tokens_mask=True,
    )  # fmt: skip
    ids, special = inputs["input_ids"], inputs.pop("special_tokens_mask").bool()
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    masked = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & ~special
    labels = torch.where(masked, ids, IGNORED)
    return dict(inputs) | {"input_ids": ids.masked_fill(masked, tokenizer.mask_token_id), "labels": labels}


def _cut(
    chosen: Sequence[Sequence[str]], tokenizer: Any, settings: BaseSettings, rng: random.Random
) -> dict[str, Tensor]:
    """A docstring's sentences without some spans of words, each of which one mask stands for; and the whole of them."""
    whole = [" ".join(own) for own in chosen]
    cut = []
    for text in whole:
        words, kept, i = text.split(), [], 0
        while i < len(words):
            if rng.random() < MASKED_SHARE / 3:
                kept.append(tokenizer.mask_token)
                i += rng.randint(1, 5)
            else:
                kept.append(words[i])
                i += 1
        cut.append(" ".join(kept))
    options = {"truncation": True, "max_length": settings.longest, "padding": True, "return_tensors": "pt"}
    inputs, targets = tokenizer(cut, **options), tokenizer(whole, **options)
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


__all__ = ["KINDS", "BaseSettings", "pretrained"]
