"""Importance inside the backward: each layer's averages take its gradients as its own backward finishes them.

That is variant "paper", whose importance reads the parameters before the optimizer's step. It is right only where the
gradient that the layer's backward hands over is the one that the optimizer will see. Whether it was is not promised
beforehand but looked at afterwards: nothing may have written to it since. The new averages wait in the other half of
the ping-pong pair, so where a gradient was clipped, reduced, unscaled, hooked, or made by a module that ran twice, the
launch before the optimizer's step does it over: the whole model on the CPU, which has no launch otherwise; that
parameter on a GPU, where the launch is made in any case and skips the others.

What a GPU saves by it, by calculation; no device has timed it. With fp32 adapters and K = N the launch before the step
moves 24 bytes an element, and the one that adds the orthogonality term's gradients 12. In the backward it is 20 for A
and 16 for B, the term included, and 1 for the sums that are handed over: 19 on average in place of 24, or of 36 with
the term. Against that, every micro-batch pays, since none knows that it is the last. ``AdaLoraAdamW`` moves 44 bytes
with importance and 28 without: beside it 47 in place of 44, or of 56 with the term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from adalora_kernels.allocator.fused_ways import Planned, way_of
from adalora_kernels.allocator.triplets import refuse_several_devices
from adalora_kernels.ops.importance import LayerImportance, OrthogonalityShare, listen, sink_of
from adalora_kernels.ops.orthogonality import Term, when_backward_ends

if TYPE_CHECKING:
    from adalora_kernels.allocator.engine import BudgetEngine


FUSED = "fused into the backward"


@dataclass
class _Expected:
    """What a parameter and its gradient must be after the backward.

    Attributes:
        address: where the gradient lies.
        version: how often it was written to, as autograd counts.
        param_version: likewise the parameter.
        values: of its first row, since a GradScaler's unscaling and a collective write behind autograd's back; None
            where the device compares.
    """

    address: int
    version: int
    param_version: int
    values: Tensor | None


class _Backward:
    """Held by a callback of one backward: alive until that has ended, or failed, also within those that it starts."""


class _Taken(NamedTuple):
    """The orthogonality term of a backward, with its slopes and scale."""

    term: Term
    slopes: Tensor
    scale: Tensor
    backward: ref[_Backward]


@dataclass
class _Step:
    """What the backwards of one optimizer step have left.

    Attributes:
        expected: of A, E, B of each layer that was seen; None where it can't be fused.
        seen_in: the backward in which each layer was last seen.
        because: why something can't be, in the words of ``explain``.
        term: that of the backward under way.
        termed: the layers whose gradients hold their share of it.
        wanted: whether this step takes gradients at all; None where not asked yet.
    """

    expected: dict[int, tuple[_Expected, ...] | None] = field(default_factory=dict)
    seen_in: dict[int, int] = field(default_factory=dict)
    because: str = ""
    term: _Taken | None = None
    termed: set[int] = field(default_factory=set)
    wanted: bool | None = None


class FusedImportance:
    """The sink of all layers of one allocator; ``RankAllocator.fuse_backward`` makes it.

    Raises:
        ValueError: layers on several devices.
    """

    def __init__(self, engine: BudgetEngine) -> None:
        refuse_several_devices("fuse_backward()", engine.triplets)
        self._engine = engine
        self._outcome = "no step yet"
        self._committed = False
        self._step = _Step()
        self._layers: dict[int, int] = {}
        self._follow()

    def _follow(self) -> None:
        """Listen to the layers' parameters as they are now."""
        engine = self._engine
        params = [t.parameters for t in engine.triplets]
        self._params, self._state = params, engine.importance
        self._layers = {id(A): i for i, (A, _, _) in enumerate(params)}
        self._way = way_of(engine)
        shapes = engine.importance.layout.shapes
        starts = [0]
        for r in [*(r for r, _, _ in shapes), *(r for r, _, _ in shapes)]:
            starts.append(starts[-1] + r * r)
        self._slopes_at = [(starts[i], starts[len(shapes) + i]) for i in range(len(shapes))]
        for A, _, _ in params:
            listen(A, self)

    def stop(self) -> None:
        """Listen no longer."""
        for A, _, _ in self._params:
            if sink_of(A) is self:
                listen(A, None)

    def _wanted(self) -> bool:
        engine, step = self._engine, self._step
        if step.wanted is None:
            if engine.clock is not None:  # every step takes them, and those that shouldn't have undo it
                step.wanted = True
            else:
                step.wanted = engine.schedule.plan(engine.next_step, engine.importance.settled).update
        return step.wanted

    @property
    def outcome(self) -> str:
        """What became of the last step that took gradients, in words. Waits for the device where that has decided."""
        redone = self._way.redone() if self._committed else []
        if not redone:
            return self._outcome
        name, others = self._engine.triplets[redone[0]].name, len(redone) - 1
        more = f" and of {others} more" if others else ""
        return f"{self._outcome}; launched before the step: the gradient of {name}{more} was written to unseen"

    def reset(self, because: str = "") -> None:
        """Forget what the backwards have left: this step takes no gradients, or not those."""
        self._step = _Step()
        self._note(f"launched before the step: {because}" if because else "no gradients taken")

    def _note(self, outcome: str, committed: bool = False) -> None:
        self._outcome, self._committed = outcome, committed

    def begin_layer(self, lora_A: Tensor) -> LayerImportance | None:
        """As ``ops.importance.Sink`` says."""
        layer = self._layers[id(lora_A)]
        planned = self._plan(layer) if self._way.piecewise else None
        return None if planned is None else self._way.begin(layer, planned)

    @torch.no_grad()
    def take_layer(
        self, lora_A: Tensor, dA: Tensor, dE: Tensor, dB: Tensor, begun: LayerImportance | None = None
    ) -> None:
        """As ``ops.importance.Sink`` says."""
        step, layer = self._step, self._layers[id(lora_A)]
        grads, params = (dA, dE, dB), self._params[layer]
        if not self._way.piecewise:
            planned = self._plan(layer)
        else:
            planned = None if begun is None or not begun.done else Planned(begun.before, begun.term)
            if planned is None and not step.because and lora_A.numel() > 0 and self._wanted():
                name = self._engine.triplets[layer].name
                step.because = f"the backward of {name} did not come to a last stage that takes importance"
        step.expected[layer], step.seen_in[layer] = None, _current_backward()
        if planned is None or not (self._way.piecewise or all(map(_fits, grads, params))):
            return
        values = self._way.take(layer, params, grads, planned)
        if planned.term is not None:
            step.termed.add(layer)
        step.expected[layer] = tuple(
            _Expected(g.data_ptr(), g._version, p._version, value)
            if before is None
            else _Expected(before.data_ptr(), before._version + 1, p._version, value)
            for p, g, before, value in zip(params, grads, planned.before, values, strict=True)
        )

    def _plan(self, layer: int) -> Planned | None:
        """How the layer whose backward is under way can be taken; None where it can't."""
        step, params = self._step, self._params[layer]
        if self._engine.importance is not self._state:  # of parameters that were moved, or have other shapes
            return None
        share = None
        if step.term is not None and step.term.backward() is None:
            step.term = None  # of a backward that failed
        if step.term is not None and layer not in step.termed:
            share = OrthogonalityShare(step.term.slopes, *self._slopes_at[layer], step.term.scale)
        before = [p.grad for p in params]
        if layer in step.expected:
            expected = step.expected[layer]
            if expected is None:
                return None
            if not all(map(_arrived, params, expected)):
                name = self._engine.triplets[layer].name
                step.because = (
                    f"{name} ran twice in one backward"
                    if step.seen_in[layer] == _current_backward()
                    else f"the gradient of {name} was cleared or written to between two backwards"
                )
                return None
        if not self._wanted():
            return None
        there = [g for g in before if g is not None]
        if there and share is not None:
            step.because = "the orthogonality term came on top of gradients that were there"
            return None
        if self._way.piecewise and not all(map(_lies_plain, before, params)):
            step.because = f"{self._engine.triplets[layer].name} is not contiguous, or accumulates in another dtype"
            return None
        return Planned(before, share)

    def take_term(self, term: Term, slopes: Tensor, scale: Tensor) -> bool:
        """As ``ops.importance.Sink`` says: the layers' backwards, which come after, add it to their gradients."""
        step, backward = self._step, _Backward()
        if len(term.lora_A) != len(self._params) or len(term.lora_B) != len(self._params):
            return False
        mine = [A is p[0] and B is p[2] for A, B, p in zip(term.lora_A, term.lora_B, self._params, strict=True)]
        another = step.term is not None and step.term.backward() is not None
        if not all(mine) or another or step.expected or not self._wanted():
            return False
        step.term = _Taken(term, slopes, scale, ref(backward))
        step.termed.clear()
        when_backward_ends(lambda: self._end_term(backward))
        return True

    @torch.no_grad()
    def _end_term(self, backward: _Backward) -> None:
        """Give the layers that this backward left out, or could not fuse, their share of the term."""
        step = self._step
        if step.term is None or step.term.backward() is not backward:
            return
        (term, slopes, scale, _), step.term = step.term, None
        rest = [i for i in range(len(self._params)) if i not in step.termed]
        if len(rest) == len(self._params):
            term.accumulate(slopes, scale)
        elif rest:
            at = [*(self._slopes_at[i][0] for i in rest), *(self._slopes_at[i][1] for i in rest)]
            lora_A, lora_B = ([self._params[i][part] for i in rest] for part in (0, 2))
            ranks = [self._params[i][0].shape[0] for i in rest] * 2
            own = torch.cat([slopes[a : a + r * r] for a, r in zip(at, ranks, strict=True)])
            term.part(lora_A, lora_B).accumulate(own, scale)
        for i in rest:
            step.expected[i] = None

    def collect(self, params: Sequence[Tensor]) -> Tensor | None:
        """Take over what the backwards have left, if it is the whole model's and nothing has changed since.

        Returns:
            bool [1], whether all was finite, as ``ops.importance_update`` would; None where the launch must do it.
        """
        step, self._step = self._step, _Step()
        replaced = any(p is not q for p, q in zip(params[::3], (own[0] for own in self._params), strict=True))
        if replaced or self._engine.importance is not self._state:
            self.stop()
            self._follow()
            self._note("launched before the step: parameters were replaced or moved")
            return None
        known: list[bool] = []
        reasons: dict[int, str] = {}
        for layer, own in enumerate(self._params):
            expected = step.expected.get(layer)
            name = self._engine.triplets[layer].name
            if self._way.piecewise and own[1].numel() == 0:  # nothing to take
                known += (False, False, False)
                continue
            if expected is None:
                known += (False, False, False)
                reasons[layer] = step.because or f"{name} was not fused in this step"
                continue
            known += map(_arrived, own, expected)
            if not all(known[-3:]):
                moved = any(p._version != e.param_version for p, e in zip(own, expected, strict=True))
                reasons[layer] = (
                    f"{'a parameter' if moved else 'the gradient'} of {name} was written to after its backward"
                )
        because = next(iter(reasons.values()), "")
        if reasons and not (self._way.piecewise and any(known)):
            self._note(f"launched before the step: {because}")
            return None
        finite = self._way.commit(params, known)
        held = [p.numel() > 0 for own in self._params for p in own]
        missed = sum(has and not is_known for has, is_known in zip(held, known, strict=True))
        but = f" but for {missed} of {sum(held)} gradients; launched before the step: {because}"
        self._note(FUSED + (but if missed else ""), committed=True)
        return finite


def _fits(grad: Tensor, param: Tensor) -> bool:
    return grad.is_contiguous() and grad.dtype == param.dtype


def _lies_plain(before: Tensor | None, param: Tensor) -> bool:
    """Whether a parameter and the gradient that is there lie as the last stage reads them."""
    return param.is_contiguous() and (before is None or _fits(before, param))


def _arrived(param: Tensor, expected: _Expected) -> bool:
    grad = param.grad
    if grad is None or grad.data_ptr() != expected.address or grad._version != expected.version:
        return False
    if param._version != expected.param_version:
        return False
    return expected.values is None or torch.equal(grad[:1], expected.values)


def _current_backward() -> int:
    return int(torch._C._current_graph_task_id())


__all__ = ["FusedImportance"]
