"""The trainings: the base, then the same adaptation through PEFT and through our kernels, step by step in turns."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adalora_kernels.cli.demo.model import EncodedPairs, PairEncoder
from adalora_kernels.cli.demo.settings import MATRICES, Settings

PHASES = ("forward", "backward", "optimizer", "importance + masking + orthogonality")
_WARMUP_SHARE = 0.1


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of ``size`` of the numbers below ``count``, in a new order each time round.

    Raises:
        ValueError: a batch is larger than all there is.
    """
    if size > count:
        raise ValueError(f"batch: expected at most the {count} training pairs, got {size}")
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(pool) < size:
            pool = torch.randperm(count, generator=generator)
        yield pool[:size]
        pool = pool[size:]


def optimizer_of(model: nn.Module, lr: float, steps: int, decay: float) -> tuple[Any, Any]:
    """AdamW over what trains, and a schedule that rises linearly for a tenth of the steps, then falls to 0."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)
    warmup = max(1, int(steps * _WARMUP_SHARE))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 - step / steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_base(model: PairEncoder, pairs: EncodedPairs, settings: Settings) -> None:
    """Train all weights on the base packages, with dropout; it is off again afterwards."""
    optimizer, schedule = optimizer_of(model, settings.base_lr, settings.base_steps, decay=0.01)
    _set_dropout(model, settings.base_dropout)
    torch.manual_seed(settings.seed)
    order = batches(len(pairs), settings.base_batch, settings.base_steps, settings.seed)
    progress = tqdm(order, total=settings.base_steps, desc="base", unit="step")
    for index in progress:
        loss = model(**pairs.batch(index), return_loss=True).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    _set_dropout(model, 0.0)


def _set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def with_adapter(base: PairEncoder, settings: Settings) -> Any:
    """A copy of the base under PEFT's AdaLoRA; two calls give identical models."""
    from peft import AdaLoraConfig, TaskType, get_peft_model

    config = AdaLoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        init_r=settings.init_rank,
        target_r=settings.target_rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        orth_reg_weight=settings.orthogonality,
        tinit=settings.initial_warmup,
        tfinal=settings.final_warmup,
        deltaT=settings.mask_interval,
        total_step=settings.steps,
        target_modules=list(MATRICES),
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers 5 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(copy.deepcopy(base), config).train()


@dataclass
class _Marks:
    """Times within one step, in seconds, in their order."""

    inner_end: float = 0.0
    term_backward: float = 0.0
    task_backward: float = 0.0


@dataclass
class Contender:
    """One of the compared trainings.

    The orthogonality term lies inside the model's forward and backward, where its time is found by three marks: the
    forward ends for the model itself before the term is computed; the backward begins at the sum of both losses, once
    autograd has looked through the graph; and autograd, which runs what was computed last first, has finished the
    term's backward when it comes to the node of the task loss.

    Attributes:
        name: for the table.
        model: a PEFT model.
        losses: of each step, as returned by the model, with the orthogonality term.
        task_losses: of each step, without it.
        milliseconds: of each phase and step.
    """

    name: str
    model: Any
    settings: Settings
    losses: list[float] = field(default_factory=list)
    task_losses: list[float] = field(default_factory=list)
    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def __post_init__(self) -> None:
        self.optimizer, self.schedule = optimizer_of(self.model, self.settings.lr, self.settings.steps, decay=0.0)
        self._marks = _Marks()
        inner = self.model.base_model.model
        forward = inner.forward

        def marked(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if output.loss is not None:
                self.task_losses.append(output.loss.item())
                output.loss.grad_fn.register_prehook(partial(self._mark, "task_backward"))
                self._marks.inner_end = self._now()
            return output

        inner.forward = marked

    def _mark(self, name: str, _: Any) -> None:
        setattr(self._marks, name, self._now())

    def _now(self) -> float:
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        return time.perf_counter()

    def step(self, number: int, batch: dict[str, Tensor]) -> None:
        """One optimizer step, ``number`` counted from 0."""
        start = self._now()
        loss = self.model(**batch, return_loss=True).loss
        forward_end = self._now()
        loss.grad_fn.register_prehook(partial(self._mark, "term_backward"))
        backward_start = self._now()
        loss.backward()
        backward_end = self._now()
        self.optimizer.step()
        self.schedule.step()
        optimizer_end = self._now()
        self.model.base_model.update_and_allocate(number)
        end = self._now()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        marks = self._marks
        term_forward, term_backward = forward_end - marks.inner_end, marks.task_backward - marks.term_backward
        spans = (
            marks.inner_end - start,
            backward_end - backward_start - term_backward,
            optimizer_end - backward_end,
            term_forward + term_backward + end - optimizer_end,
        )
        for phase, seconds in zip(PHASES, spans, strict=True):
            self.milliseconds[phase].append(1e3 * seconds)

    def medians(self) -> dict[str, float]:
        """Milliseconds of each phase, and of the whole step as ``step``: medians over the steps."""
        whole = [sum(spans) for spans in zip(*self.milliseconds.values(), strict=True)]
        return {phase: median(spans) for phase, spans in self.milliseconds.items()} | {"step": median(whole)}

    def live_ranks(self) -> dict[tuple[int, str], int]:
        """Triplets left, by layer and name of the matrix: those with a singular value other than 0."""
        ranks = {}
        for path, parameter in self.model.named_parameters():
            if ".lora_E." in path:
                layer, _, matrix = path.split(".layer.")[1].split(".lora_E.")[0].partition(".")
                ranks[int(layer), MATRICES[matrix]] = int(torch.count_nonzero(parameter))
        return ranks


def compare(contenders: list[Contender], pairs: EncodedPairs, settings: Settings) -> None:
    """Train all contenders on the same batches, in turns step by step: a busy moment of the machine hits all."""
    order = batches(len(pairs), settings.batch, settings.steps, settings.seed)
    progress = tqdm(order, total=settings.steps, desc="adapt", unit="step")
    for number, index in enumerate(progress):
        batch = pairs.batch(index)
        # Who goes second finds the batch in the caches: they take it in turns.
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            contender.step(number, batch)
        progress.set_postfix({c.name: f"{c.losses[-1]:.4f}" for c in contenders}, refresh=False)


__all__ = ["PHASES", "Contender", "batches", "compare", "optimizer_of", "train_base", "with_adapter"]
