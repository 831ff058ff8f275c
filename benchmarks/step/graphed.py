"""Whole steps as one CUDA graph each: ours by ``record_step``, PEFT's LoRA and the frozen model by a plain capture.

Without a CUDA device the same code runs, with the step itself in place of its replay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoder
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2ForSequenceClassification, DebertaV2Model

from adalora_kernels.allocator.graphed import CudaGraph, Recorder, Run, record_step
from adalora_kernels.allocator.static import StaticBatch
from benchmarks.step.case import Case
from benchmarks.step.measure import (
    check_losses,
    clocked,
    losses,
    milliseconds,
    turns,
    weighed,
)
from benchmarks.step.models import Batch
from benchmarks.step.names import FROZEN, GRAPHED, LORA, OURS, OURS_AGAIN, OURS_SWEPT, PEFT, eager
from benchmarks.step.rehearsal import Rehearsal
from benchmarks.step.systems import System, systems, trained
from benchmarks.timing import interleave, ratio

CAPTURED = (FROZEN, LORA, OURS, OURS_SWEPT, OURS_AGAIN, PEFT)
WARM_UPS = 3
Step = Callable[[Batch], Tensor]


def measure(case: Case, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """One case.

    Args:
        case: the model, and how it is trained.
        rounds, warmup: timed steps of each contestant, and untimed ones ahead of them.

    Returns:
        A record: milliseconds of replayed steps, and of PEFT's two as they are; ratios within rounds; the noise; by
        contestant that can't be captured the error that says why; and on a CUDA device the most memory that the
        captured step takes beyond what it finds.

    Raises:
        AssertionError: a replay's losses differ from those of the eager step.
    """
    torch.set_num_threads(case.threads)
    batches = case.batches()
    plain = systems(case, (FROZEN, LORA, PEFT))
    held = systems(case, CAPTURED, capturable=True)
    steps: dict[str, Step] = {}
    peaks, refused = dict[str, int](), dict[str, str]()
    for name, system in held.items():
        recorder = Weighing(case.device)
        try:
            steps[name] = captured(system, batches[0], recorder)
        except RuntimeError as error:
            refused[name] = reason(error)
            continue
        if recorder.peak is not None:
            peaks[name] = recorder.peak
    for other, named in ((FROZEN, (FROZEN,)), (LORA, (LORA,)), (PEFT, (OURS, OURS_SWEPT, OURS_AGAIN, PEFT))):
        expected = losses(plain[other].run, batches)
        for name in (name for name in named if name in steps):
            check_losses(f"{name}, captured", losses(steps[name], batches), other, expected, case.tolerance)
    steps |= {eager(name): plain[name].run for name in (LORA, PEFT)}
    contestants = {name: turns(step, batches) for name, step in steps.items()}
    seconds = interleave(contestants, rounds, warmup, partial(clocked, device=case.device))
    ours = [name for name in (OURS, OURS_SWEPT) if name in steps]
    record = {
        "benchmark": GRAPHED,
        "case": case.record(GRAPHED),
        "milliseconds": {name: milliseconds(s) for name, s in seconds.items()},
        "eager_peft_over_ours": {name: ratio(seconds[eager(PEFT)], seconds[name]) for name in ours},
        "ours_over_lora": {name: ratio(seconds[name], seconds[LORA]) for name in ours if LORA in steps},
        "not_captured": refused,
        "rounds": rounds,
    }
    if {OURS, OURS_AGAIN} <= set(steps):
        record["noise"] = abs(ratio(seconds[OURS_AGAIN], seconds[OURS]) - 1)
    return record | ({"peak_bytes": peaks} if peaks else {})


def captured(system: System, sample: Batch, recorder: Recorder) -> Step:
    """A step that leaves model and optimizer as they are, and trains them when it is called.

    Raises:
        RuntimeError: it waits for the device, or does something else that a graph can't hold.
    """
    without_waits(system.model)
    if system.allocator is not None:
        assert system.optimizer is not None
        loss, orthogonality = None, 0.0  # the model's own loss holds the term
        return record_step(
            system.model, system.optimizer, system.allocator, sample, loss, orthogonality, WARM_UPS, recorder
        )
    params = trained(system.model)
    before = [p.detach().clone() for p in params]
    batch = StaticBatch(sample, next(system.model.parameters()).device)
    recorder.warm_up(lambda: system.run(batch.value), WARM_UPS)
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
        for state in system.optimizer.state.values() if system.optimizer is not None else ():
            for tensor in state.values():
                tensor.zero_()
    replay, loss_of_replay = recorder.record(lambda: system.run(batch.value))

    def step(given: Batch) -> Tensor:
        batch.copy_(given)
        replay()
        return loss_of_replay

    return step


def without_waits(model: nn.Module) -> None:
    """Spare DeBERTa-v2 and BART what waits for the device in transformers.

    Without an attention mask both look for padding, BART in its decoder, where only a square one spares it that.
    DeBERTa copies a number from the host to lay out relative positions, and without a problem type its loss looks for
    labels.
    """

    def with_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = args[0] if args else kwargs["input_ids"]
        return args, kwargs | (
            {"attention_mask": torch.ones_like(given)} if kwargs.get("attention_mask") is None else {}
        )

    def with_positions(encoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "kept_positions" not in encoder.__dict__:
            encoder.__dict__["kept_positions"] = encoder.get_rel_pos(args[0])
        return args, kwargs | {"relative_pos": encoder.__dict__["kept_positions"]}

    def with_causal_mask(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = args[0] if args else kwargs["input_ids"]
        if "kept_mask" not in decoder.__dict__:
            square = torch.ones(given.shape[1], given.shape[1], dtype=torch.bool, device=given.device)
            decoder.__dict__["kept_mask"] = square.tril()[None, None]
        return args, kwargs | {"attention_mask": decoder.__dict__["kept_mask"]}

    for module in model.modules():
        if isinstance(module, BartDecoder):
            module.register_forward_pre_hook(with_causal_mask, with_kwargs=True)
        if isinstance(module, DebertaV2ForSequenceClassification):
            module.config.problem_type = "single_label_classification"
            module.classifier.register_forward_hook(
                lambda layer, args, logits: logits.float()
            )  # as its other loss does
        if isinstance(module, DebertaV2Model):
            module.register_forward_pre_hook(with_mask, with_kwargs=True)
            module.encoder.register_forward_pre_hook(with_positions, with_kwargs=True)


def reason(error: BaseException) -> str:
    """An error in one line of a record: what it began with, then what became of it."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    said = dict.fromkeys(f"{type(link).__name__}: {link}" for link in (chain[-1], error))
    return "; then ".join(" ".join(text.split())[:300] for text in said)


class Weighing:
    """A recorder that notes the most memory that a step takes while it is recorded, beyond what it finds.

    Attributes:
        peak: bytes of the last recording; None without a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._recorder: Recorder = Rehearsal() if device == "cpu" else CudaGraph()
        self.peak: int | None = None
        self.obstacle, self.warm_up = self._recorder.obstacle, self._recorder.warm_up

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """As ``Recorder``'s."""
        recorded, self.peak = weighed(partial(self._recorder.record, run), self._device)
        return recorded


__all__ = ["captured", "measure", "reason", "without_waits"]
