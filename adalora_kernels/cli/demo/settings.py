"""The demo's settings, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The adapted matrices: where they lie in a layer of transformers' DeBERTa-v2, and what they are called in the picture.
MATRICES = {
    "attention.self.query_proj": "query",
    "attention.self.key_proj": "key",
    "attention.self.value_proj": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "feed-forward in",
    "output.dense": "feed-forward out",
}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        output: folder of the table and the picture.
        seed: of every random choice.
        steps: optimizer steps of each of the two compared trainings.
        backend: as in ``patch_model``.
        device: where everything runs.
        sources: folder whose docstrings are read; None for the standard library.
        base_steps, base_batch, base_lr, base_dropout: how the base is trained, all of its weights.
        batch, lr: of the adaptation; ``batch`` pairs a step, the others of the batch are the negatives.
        init_rank, target_rank, alpha, mask_interval, orthogonality: AdaLoRA's init_r, target_r, lora_alpha, deltaT and
            orth_reg_weight.
        hidden_size, layers, vocabulary, max_length: the size of the model, and tokens per text.
        compared: leading steps whose losses must agree.
        tolerance: largest relative difference of those losses.
        least_accuracy: held-out accuracy below which the demo fails.
    """

    output: Path
    seed: int = 0
    steps: int = 300
    backend: str | None = None
    device: str = "cpu"
    sources: Path | None = None
    base_steps: int = 60
    base_batch: int = 32
    base_lr: float = 5e-4
    base_dropout: float = 0.1
    batch: int = 24
    lr: float = 1e-3
    init_rank: int = 12
    target_rank: int = 4
    alpha: int = 32
    mask_interval: int = 5
    orthogonality: float = 0.1
    hidden_size: int = 256
    layers: int = 4
    vocabulary: int = 4000
    max_length: int = 20
    compared: int = 20
    tolerance: float = 1e-4
    least_accuracy: float = 0.75

    @property
    def initial_warmup(self) -> int:
        """AdaLoRA's tinit: steps before the budget shrinks."""
        return self.steps // 6

    @property
    def final_warmup(self) -> int:
        """AdaLoRA's tfinal: steps after it has reached its target."""
        return self.steps // 4

    @property
    def target_budget(self) -> int:
        """Triplets of the whole model that may stay."""
        return self.target_rank * self.layers * len(MATRICES)


__all__ = ["MATRICES", "Settings"]
