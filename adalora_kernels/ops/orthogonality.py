"""The orthogonality regulariser of all layers at once, as one differentiable number.

The forward leaves R² slopes of each matrix; the backward makes all gradients from them in one launch. They reach the
matrices in one of two ways: through autograd, matrix by matrix, or (``accumulate=True``) added to every ``.grad`` by
that one launch, at the end of the backward. Autograd would spend an addition on each of 2n matrices, since the layers'
own gradients arrive there too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends.select import Backend, implementation, select
from adalora_kernels.ops.checks import floating_state_dtype
from adalora_kernels.ops.importance import sink_of
from adalora_kernels.ops.once import differentiable_once
from adalora_kernels.ops.shards import are_partitioned, are_sharded, whole_matrices

_PLAIN = frozenset({torch.nn.Parameter, Tensor})
_HOOKS_AND_LEAF = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks", "is_leaf")


def orthogonality_loss(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    squared: bool = False,
    *,
    accumulate: bool | None = False,
    backend: str | Backend | None = None,
) -> Tensor:
    """γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all matrices, or γ · Σ of their squares (AdaLoRA, equation 4).

    Args:
        lora_A: the [R, K] matrices. Those that are DTensors, or that ZeRO-3 has partitioned, are made whole first, all
            in one collective: rows of A that meet in A Aᵀ lie on different ranks. Each rank then computes what one
            process would, and keeps its part of the gradients.
        lora_B: the [N, R] matrices.
        weight: γ, at least 0.
        squared: False for the published codes' unsquared mean, True for the paper's squared sum.
        accumulate: add the gradient to the matrices' ``.grad`` when the backward ends, all at once. Hooks on the
            matrices don't see it. ``torch.autograd.grad`` can't have it: it raises where it asks for the first matrix
            that trains, and goes without it elsewhere, as does ``backward(inputs=...)``. Only where
            ``can_accumulate``; None means wherever that is so. Under ``torch.compile`` the term is part of the graph,
            gradients included, whatever ``accumulate`` and ``backend`` say.
        backend: "reference", "native", "triton", or None for the best that can run.

    Returns:
        The value with γ in it, 0-d, fp32 (fp64 if any matrix is fp64).

    Raises:
        ValueError: no matrices, a negative weight, matrices on several devices, or matrices that can't accumulate.
        RuntimeError: the backend asked for can't run.
    """
    if not lora_A and not lora_B:
        raise ValueError("lora_A, lora_B: expected at least one matrix, got none")
    if not isinstance(weight, int | float):
        raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a finite number of at least 0, got {weight}")
    matrices = (*lora_A, *lora_B)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _traced(lora_A, lora_B, float(weight), squared)
    possible = accumulate is not False and can_accumulate(matrices)
    if accumulate and not possible:
        raise ValueError("accumulate: expected distinct leaves without hooks; see can_accumulate")
    if not possible and (are_sharded(matrices) or are_partitioned(matrices)):
        whole = whole_matrices(matrices)
        lora_A, lora_B = whole[: len(lora_A)], whole[len(lora_A) :]
    term = Term(list(lora_A), list(lora_B), float(weight), squared, backend)
    if not possible:
        return _Orthogonality.apply(term, *lora_A, *lora_B)
    trained = next((m for m in matrices if m.requires_grad), matrices[0])
    return _AccumulatedOrthogonality.apply(term, trained)


def _traced(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool) -> Tensor:
    """The same as an expression, for the compiler to differentiate and fuse, and for torch.func to transform: nothing
    goes behind autograd's back."""
    matrices = [*lora_A, *(b.t() for b in lora_B)]
    dtype = floating_state_dtype(matrices)
    norms = []
    for matrix in matrices:
        rows = matrix.to(dtype)
        norms.append(torch.linalg.matrix_norm(rows @ rows.t() - torch.eye(len(rows), dtype=dtype, device=rows.device)))
    stacked = torch.stack(norms)
    return weight * (stacked.square().sum() if squared else stacked.mean())


def can_accumulate(matrices: Iterable[Tensor]) -> bool:
    """Whether gradients may be added to ``.grad`` behind autograd's back: distinct plain leaves that nobody watches.

    A hook would see the gradient without this share of it, and a subclass (DTensor, say) or a parameter that another
    library partitions keeps its gradients elsewhere.
    """
    matrices = list(matrices)
    if not _PLAIN.issuperset(map(type, matrices)):
        return False
    if "deepspeed" in sys.modules and any("ds_id" in m.__dict__ for m in matrices):
        return False
    for hooks, later_hooks, is_leaf in map(_HOOKS_AND_LEAF, matrices):
        if hooks or later_hooks or not is_leaf:
            return False
    ids = sorted(map(id, matrices))  # in a set they would collide, since they lie at multiples of powers of two
    return not any(map(eq, ids, ids[1:]))


class Term:
    """One regulariser: its matrices and settings, and its launches."""

    def __init__(
        self,
        lora_A: list[Tensor],
        lora_B: list[Tensor],
        weight: float,
        squared: bool,
        backend: str | Backend | None,
    ) -> None:
        self.lora_A, self.lora_B, self.weight, self.squared = lora_A, lora_B, weight, squared
        matrices = [*lora_A, *lora_B]
        rank = max((a.shape[0] for a in lora_A if a.dim() == 2), default=0)
        dtype = floating_state_dtype(matrices)
        chosen = select("orthogonality", matrices[0].device.type, dtype, rank, backend).backend
        self.module = implementation("orthogonality", chosen)

    def part(self, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> Term:
        """The same of some of its layers: with their slopes, their share of the gradients."""
        some = copy(self)
        some.lora_A, some.lora_B = list(lora_A), list(lora_B)
        return some

    def versions(self) -> list[int]:
        """How often each matrix has been written to."""
        return [m._version for m in (*self.lora_A, *self.lora_B)]

    def value(self) -> tuple[Tensor, Tensor]:
        """The value and the slopes."""
        result: tuple[Tensor, Tensor] = self.module.orthogonality(self.lora_A, self.lora_B, self.weight, self.squared)
        return result

    def gradients(self, slopes: Tensor, scale: Tensor) -> list[Tensor]:
        """New gradients of A₀, A₁, …, B₀, B₁, …"""
        grads = _room([*self.lora_A, *self.lora_B])
        self.module.orthogonality_gradients(self.lora_A, self.lora_B, slopes, scale, grads, False)
        return grads

    @torch.no_grad()
    def accumulate(self, slopes: Tensor, scale: Tensor) -> None:
        """Add the gradients to ``.grad`` of the matrices that train."""
        matrices = [*self.lora_A, *self.lora_B]
        grads = [m.grad for m in matrices]
        if not any(grad is not None for grad in grads):
            for m, grad in zip(matrices, self.gradients(slopes, scale), strict=True):
                if m.requires_grad:
                    m.grad = grad
            return
        targets: list[Tensor] = []
        for m, there in zip(matrices, grads, strict=True):
            if there is not None and there.is_contiguous() and there.dtype == m.dtype and m.requires_grad:
                targets.append(there)
                continue
            target = torch.empty_like(m, memory_format=torch.contiguous_format)
            targets.append(target.zero_() if there is None else target.copy_(there))
            if m.requires_grad:
                m.grad = target
        self.module.orthogonality_gradients(self.lora_A, self.lora_B, slopes, scale, targets, True)
        # Kernels write behind autograd's back; whoever had read these gradients must see that they changed.
        torch.autograd.graph.increment_version(targets)


def _room(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients, those of one shape, dtype and device as slices of one buffer."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.shape, m.dtype, m.device), []).append(i)
    grads: list[Tensor] = [matrices[0]] * len(matrices)
    for (shape, dtype, device), places in alike.items():
        buffer = torch.empty((len(places), *shape), dtype=dtype, device=device)
        for place, grad in zip(places, buffer.unbind(0), strict=True):
            grads[place] = grad
    return grads


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Term, *matrices: Tensor) -> Tensor:
        value, slopes = term.value()
        ctx.term = term
        # The matrices only so that a change of one is noticed: the launch reads them through the term.
        ctx.save_for_backward(slopes, *matrices)
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.term.gradients(ctx.saved_tensors[0], grad_value)
        needs = ctx.needs_input_grad[1:]
        return (None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)))


class _AccumulatedOrthogonality(torch.autograd.Function):
    """The gradient's way round autograd. The one matrix that autograd sees makes the value part of the graph."""

    @staticmethod
    def forward(ctx: Any, term: Term, trained: Tensor) -> Tensor:
        value, slopes = term.value()
        ctx.term, ctx.versions = term, term.versions()
        ctx.save_for_backward(slopes)
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_value: Tensor) -> tuple[None, None]:
        (leaf, _), *_ = ctx.next_functions
        try:
            torch._C._will_engine_execute_node(leaf)
        except RuntimeError:
            raise RuntimeError(
                "orthogonality: torch.autograd.grad can't have this term's gradient, which is added to .grad when "
                "backward() ends; leave the term out of that loss, or make it without accumulate=True"
            ) from None
        term, (slopes,) = ctx.term, ctx.saved_tensors
        if term.versions() != ctx.versions:
            raise RuntimeError("orthogonality: a matrix was modified in place between the forward and this backward")
        sink = sink_of(term.lora_A[0]) if term.lora_A else None
        if sink is not None and sink.take_term(term, slopes, grad_value):
            return None, None
        when_backward_ends(lambda: term.accumulate(slopes, grad_value))
        return None, None


def when_backward_ends(function: Callable[[], None]) -> None:
    """Call ``function`` when the backward that is under way has ended, after what others wait for then."""
    engine = torch.autograd.Variable._execution_engine
    # Queued again when its turn comes: what others queue meanwhile, such as DistributedDataParallel's wait for its
    # reductions, then comes first.
    engine.queue_callback(lambda: engine.queue_callback(function))


__all__ = ["Term", "can_accumulate", "orthogonality_loss", "when_backward_ends"]
