"""A whole training step as one CUDA graph: forward, orthogonality, backward, optimizer, importance and masks.

A replay costs the host one launch, whatever the model. What a step decides (the learning rate, the budget, whether
averages and masks change) it reads from tensors on the device; everything else is as it was at the capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from adalora_kernels.allocator.adamw import AdaLoraAdamW
from adalora_kernels.allocator.allocator import RankAllocator
from adalora_kernels.allocator.attach import innermost
from adalora_kernels.allocator.orthogonality import compute_orth_regu
from adalora_kernels.allocator.static import Snapshot, StaticBatch
from adalora_kernels.ops.orthogonality import can_accumulate

Run = Callable[[], Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


class Recorder(Protocol):
    """Who makes a replay of a step; ``CudaGraph`` is the one there is."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why steps on this device can't be recorded, or None if they can."""

    def warm_up(self, run: Run, times: int) -> None:
        """Run it as it will be recorded."""

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """The replay of a run, and where it leaves what the run returned. Nothing is computed yet."""


class CudaGraph:
    """Records into a CUDA graph."""

    def __init__(self) -> None:
        self._waited: RuntimeError | None = None

    def obstacle(self, device: torch.device) -> str | None:
        """As ``Recorder``'s."""
        return None if device.type == "cuda" else f"expected on a CUDA device, which alone has graphs, got {device}"

    def warm_up(self, run: Run, times: int) -> None:
        """On a side stream. In the last of several runs whatever waits for the device raises where it does; the first
        has to, for what is made once.

        That is kept until the capture has failed too: there are models (those of transformers, with a mask) that look
        at their input on the host in every step but one that is being captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(side):
                for i in range(times):
                    if 0 < i == times - 1:
                        torch.cuda.set_sync_debug_mode("error")
                    run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            self._waited = error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(side)

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """As ``Recorder``'s."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run()
        except RuntimeError as error:
            _end_a_capture()
            if self._waited is not None:  # it says where, as a failed capture seldom does
                raise self._waited from error
            raise
        return graph.replay, result


def _end_a_capture() -> None:
    """Capture nothing. After a capture that failed the device's random generator refuses to draw until one ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass


class GraphedStep:
    """What ``graphed_step`` returns: a training step as a call. It keeps what the graph reads alive."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        allocator: RankAllocator,
        sample_batch: Any,
        loss: Loss,
        warmup: int,
        recorder: Recorder,
    ) -> None:
        self.model, self.optimizer, self.allocator = model, innermost(optimizer), allocator
        device = _device_of(model, recorder)
        _check_settings(self.optimizer, allocator, device)
        self._batch = StaticBatch(sample_batch, device)
        attached = allocator.attached
        before = Snapshot(model, self.optimizer, allocator)
        try:
            _drive(self.optimizer, allocator)
            with _sayable(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                recorder.warm_up(lambda: self._run(loss), warmup)
                before.restore()
                self._clear()
                self._replay, self.loss = recorder.record(lambda: self._run(loss))
        except BaseException:
            before.undo()
            if allocator.attached and not attached:
                allocator.attach(self.optimizer).detach()
            allocator.expect(allocator.next_step)
            raise
        allocator.captured = True
        self._schedule = allocator.schedule
        self._parameters = [p for t in allocator.triplets for p in t.parameters]
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._reloads: list[Optimizer] = []
        self.optimizer.register_load_state_dict_post_hook(self._reloads.append)

    def _clear(self) -> None:
        """So that the backward makes gradients anew, in the graph's own memory, rather than adds to them."""
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _run(self, loss: Loss) -> Tensor:
        self._clear()
        value = loss(self.model, self._batch.value)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss: expected a tensor of one element, got {value!r:.80}")
        value.backward()
        self.optimizer.step()
        return value.detach()

    def __call__(self, batch: Any) -> Tensor:
        """Make a training step on ``batch``.

        Args:
            batch: as the sample, in structure, shapes and dtypes; on any device.

        Returns:
            The loss before the update, 0-d on the device; the next call writes over it.

        Raises:
            ValueError: another structure, shape or dtype. Nothing changes.
            RuntimeError: parameters, learning rates, the optimizer's state or the schedule were replaced since the
                capture. Nothing changes.
        """
        if (replaced := self._replaced()) is not None:
            raise RuntimeError(f"{replaced} replaced since the step was captured: make a new graphed_step")
        self._batch.copy_(batch)
        self._replay()
        return self.loss

    def _replaced(self) -> str | None:
        """What is no longer what the graph reads; None where all is."""
        if self.allocator.schedule != self._schedule:
            return "the allocator's schedule was"
        if self._reloads:
            return "the optimizer's state was"
        if any(group["lr"] is not lr for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True)):
            return "a learning rate (which is a tensor to be filled) was"
        if any(p is not q for p, q in zip(self.allocator.parameters(), self._parameters, strict=True)):
            return "parameters were"
        return None


def graphed_step(
    model: nn.Module,
    optimizer: Optimizer,
    allocator: RankAllocator,
    sample_batch: Any,
    *,
    loss: Loss | None = None,
    orthogonality: float = 0.0,
    warmup: int = 3,
) -> GraphedStep:
    """Capture a whole training step in a CUDA graph.

    Call what it returns with a batch, in place of forward, ``backward()``, ``optimizer.step()``, the allocator's call
    and ``zero_grad()``. Parameters, optimizer, allocator and random numbers are afterwards where they were before; the
    warm-up leaves no trace. ``allocator.compact`` comes before this.

    Args:
        model: on a CUDA device, in the mode in which it is to run.
        optimizer: with ``capturable=True`` and its learning rates as tensors on the device, such as
            ``AdaLoraAdamW(..., capturable=True)``, or ``AdamW(..., lr=torch.tensor(1e-3, device="cuda"),
            capturable=True)``. Schedulers write to these tensors, which replays then read. Any other than AdamW and
            Adam must have made a step.
        allocator: with ``capturable=True``; attached to the optimizer here where it isn't yet.
        sample_batch: tensors in dicts, lists and tuples, and constants. Every batch must have its shapes and dtypes.
        loss: of model and batch; None takes the ``loss`` that the model returns, called with a mapping's entries as
            keywords, a sequence's as arguments.
        orthogonality: γ of the orthogonality term to add, squared for variant "paper"; 0 where the loss holds it
            already, as that of a patched PEFT model does.
        warmup: how often the step runs before it is captured, at least 1.

    Raises:
        TypeError: not a model, an optimizer or a RankAllocator.
        ValueError: what can't be captured: a model that is not on a CUDA device, optimizer or allocator without
            ``capturable=True``, a GradScaler, DistributedDataParallel; an adapter that the optimizer doesn't train.
        RuntimeError: the step waits for the device, in a gradient hook for example. Whatever is raised, model,
            optimizer and allocator stay as they were.
    """
    return record_step(model, optimizer, allocator, sample_batch, loss, orthogonality, warmup, CudaGraph())


def record_step(
    model: nn.Module,
    optimizer: Optimizer,
    allocator: RankAllocator,
    sample_batch: Any,
    loss: Loss | None,
    orthogonality: float,
    warmup: int,
    recorder: Recorder,
) -> GraphedStep:
    """``graphed_step`` by any recorder."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(allocator, RankAllocator):
        raise TypeError(f"allocator: expected a RankAllocator, got {type(allocator).__name__}")
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1, got {warmup}")
    if orthogonality < 0:
        raise ValueError(f"orthogonality: expected at least 0, got {orthogonality}")
    given = model_loss if loss is None else loss

    def total(model: nn.Module, batch: Any) -> Tensor:
        value = given(model, batch)
        if orthogonality == 0:
            return value
        at_once = can_accumulate(m for t in allocator.triplets for m in (t.lora_A, t.lora_B))
        squared = allocator.variant == "paper"
        return value + compute_orth_regu(model, orthogonality, squared=squared, accumulate=at_once)

    return GraphedStep(model, optimizer, allocator, sample_batch, total, warmup, recorder)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns by itself, as those of transformers do.

    Raises:
        ValueError: it returns none.
    """
    if isinstance(batch, Mapping):
        outputs = model(**batch)
    else:
        outputs = model(*batch) if isinstance(batch, (list, tuple)) else model(batch)
    value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss: expected one for a model that returns {type(outputs).__name__} without a loss")
    return value


def _device_of(model: nn.Module, recorder: Recorder) -> torch.device:
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: expected no DistributedDataParallel, whose reductions a graph of one step can't hold")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"model: expected its parameters on one device, found them on {len(devices)}")
    (device,) = devices
    if (obstacle := recorder.obstacle(device)) is not None:
        raise ValueError(f"model: {obstacle}")
    return device


def _check_settings(optimizer: Optimizer, allocator: RankAllocator, device: torch.device) -> None:
    """Hold optimizer and allocator to what a graph can hold."""
    name = type(optimizer).__name__
    if allocator.clock is None:
        raise ValueError("allocator: expected RankAllocator(..., capturable=True), got one without it")
    _ = allocator.schedule  # raises where total_step is not set
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("capturable", False):
            raise ValueError(f"optimizer: expected capturable=True, got {name} without it in param_groups[{i}]")
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            raise ValueError(
                f"optimizer: expected lr as a tensor on {device} in param_groups[{i}], got {lr!r}; a number would stay "
                "what it is at the capture, whatever a scheduler sets"
            )
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise ValueError("optimizer: expected no GradScaler, which asks for an overflow on the host; train in bfloat16")
    stepped = all(p in optimizer.state for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    if not stepped and not isinstance(optimizer, Adam):
        raise ValueError(f"optimizer: expected AdamW or Adam, or one that has made a step; got a new {name}")
    if isinstance(optimizer, AdaLoraAdamW) and optimizer.allocator is not allocator:
        raise ValueError("allocator: expected the one that this AdaLoraAdamW was made with, got another")


def _drive(optimizer: Optimizer, allocator: RankAllocator) -> None:
    """See to it that the optimizer's step is the allocator's too, counted on the device."""
    if isinstance(optimizer, AdaLoraAdamW):
        return
    if allocator.attach(optimizer).counted_by_caller:
        raise ValueError(
            "allocator: expected one that counts its steps itself, got one attached with attach(optimizer, step=...), "
            "whose number would stay what it is at the capture"
        )


@contextmanager
def _sayable() -> Iterator[None]:
    """What CUDA says of a step that can't be captured, in words that say what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "synchroniz" not in text and "captur" not in text:
            raise
        raise RuntimeError(
            "graphed_step: the step waits for the device, or does something else that a CUDA graph can't hold (an "
            ".item(), a branch on a tensor, a copy from pageable memory, a gradient hook that does such a thing); the "
            f"traceback above says where: {text}"
        ) from error


__all__ = ["CudaGraph", "GraphedStep", "Recorder", "graphed_step", "model_loss", "record_step"]
