"""The final phase: layers shrink to their live rank for good, and a layer with no rank left is the frozen linear.

With E_i = 0 the triplet i adds nothing, so B diag(E) A is the same sum over the live rows of A and E and columns of B;
c, and with it ``ranknum``, stays.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adalora_kernels.allocator.triplets import Triplet

Rows = Sequence[Sequence[bool]]
_RANK_AXES = (0, 0, 1)  # of A, E, B


def refuse_wrapped(model: nn.Module, triplets: Sequence[Triplet]) -> None:
    """Hold the model to be one whose parameters nobody has laid out elsewhere yet.

    Raises:
        ValueError: DDP, FSDP or DeepSpeed has it, or a parameter has hooks.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError("model: expected compact() before a CUDA graph is captured, got it during the capture")
    before = "compact() comes before the model is wrapped"
    for t in triplets:
        for p, name in zip(t.parameters, t.parameter_names, strict=True):
            if is_laid_out(p):
                raise ValueError(f"model: expected plain parameters, but {name} is sharded or partitioned; {before}")
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise ValueError(f"model: expected parameters without hooks, but {name} has some; {before}")
    if data_parallel_wrapper(p for t in triplets for p in t.parameters) is not None:
        raise ValueError(f"model: expected no DistributedDataParallel around it; {before}")


def is_laid_out(p: Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded the parameter, or DeepSpeed's master weights count in its place."""
    return type(p) is not nn.Parameter or hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


def data_parallel_wrapper(parameters: Iterable[Tensor]) -> DistributedDataParallel | None:
    """The DistributedDataParallel that reduces any of these parameters' gradients.

    It leaves no trace on parameters that it has put into buckets, so its instances are looked for.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    wanted = set(map(id, parameters))
    wrappers = (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
    return next((w for w in wrappers if any(id(p) in wanted for p in w.parameters())), None)


def check_carriable(triplets: Iterable[Triplet], optimizer: Optimizer) -> None:
    """Hold the optimizer's state to what can be shrunk along with the parameters.

    Raises:
        ValueError: it holds none of them, or state that is neither a parameter's in shape nor a single number.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = [(p, name) for t in triplets for p, name in zip(t.parameters, t.parameter_names, strict=True)]
    if not any(id(p) in held for p, _ in params):
        raise ValueError("optimizer: expected the one that trains the adapters, found none of them in it")
    for p, name in params:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != p.shape:
                raise ValueError(
                    f"optimizer: expected state of the parameters' shapes, but {key!r} of {name} is "
                    f"{list(value.shape)} for {list(p.shape)}; make a new optimizer after compact()"
                )


@torch.no_grad()
def shrink(model: nn.Module, triplets: Sequence[Triplet], rows: Rows, optimizer: Optimizer | None) -> None:
    """Keep ``rows`` of each layer: of its parameters, their gradients, and the optimizer's state of them.

    Parameters stay the same objects. Layers without a row left stop to train.

    Args:
        model: holds the layers.
        triplets: the layers.
        rows: for each layer and each of its rows, whether to keep it.
        optimizer: checked by ``check_carriable``; None carries nothing.
    """
    for triplet, row in zip(triplets, rows, strict=True):
        if all(row):
            continue
        kept = torch.tensor([i for i, keep in enumerate(row) if keep], device=triplet.lora_E.device)
        for p, axis in zip(triplet.parameters, _RANK_AXES, strict=True):
            state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[key] = _select(value, axis, kept)
            grad = p.grad
            exchange_data(p, _select(p.data, axis, kept))
            p.grad = None if grad is None or not len(kept) else _select(grad, axis, kept)
            p.requires_grad_(p.requires_grad and len(kept) > 0)
        set_rank(model.get_submodule(triplet.name), triplet.slots[0][1], len(kept))
    if optimizer is not None and callable(resized := getattr(optimizer, "parameters_resized", None)):
        resized()


def exchange_data(p: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape; it stays the same object, without a gradient."""
    p.grad = None
    # A graph that is still alive keeps p's node for gradients, which remembers p's shape; a change of dtype makes
    # autograd drop it.
    p.data = p.new_empty(0, dtype=torch.float32 if p.dtype == torch.float64 else torch.float64)
    p.data = data


def spread(live: Sequence[bool], kept: Sequence[bool] | None) -> list[bool]:
    """Rows that live, among those that the layer had at first; ``kept`` says which of these it still has."""
    if kept is None:
        return list(live)
    rows = iter(live)
    return [bool(k and next(rows)) for k in kept]


def _select(tensor: Tensor, axis: int, kept: Tensor) -> Tensor:
    return tensor.index_select(axis, kept.to(device=tensor.device, dtype=torch.int64)).contiguous()


def set_rank(layer: nn.Module, adapter: str, rank: int) -> None:
    """The layer's own note of its rank, by which ours and the original's take the frozen linear's path at 0."""
    noted = getattr(layer, "r", None)
    if isinstance(noted, int):
        layer.r = rank  # type: ignore[assignment]
    elif isinstance(noted, dict):
        noted[adapter] = rank


__all__ = ["Rows", "check_carriable", "exchange_data", "is_laid_out", "refuse_wrapped", "set_rank", "shrink", "spread"]
