"""One step of the rank budget, in parts: what is due, the importance update, the masks (AdaLoRA, algorithm 1)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adalora_kernels.allocator.agreement import Agreement
from adalora_kernels.allocator.capturable import DeviceClock, Due, go_back_unless, position
from adalora_kernels.allocator.distributed import ShardedState
from adalora_kernels.allocator.fused import FusedImportance
from adalora_kernels.allocator.placement import follow_devices, follow_shards, state_of
from adalora_kernels.allocator.schedule import VARIANTS, BudgetSchedule, StepPlan
from adalora_kernels.allocator.tensorboard import write_scalars
from adalora_kernels.allocator.triplets import Lookup, Triplet, find_triplets, no_triplets, refuse_several_devices
from adalora_kernels.backends.select import Backend, parse, select
from adalora_kernels.reference.importance import REDUCTIONS

METRICS = ("ipt", "mag")


class Turn(NamedTuple):
    """One step of the allocator, from ``begin`` to ``finish``.

    Attributes:
        step: its number, counted from 0; None where the device counts.
        plan: what it does; where the device decides, what it may do.
        params: A, E and B of each layer, as they are in this step.
        lora_E: the E among them.
        due: what it does, where the device decides.
    """

    step: int | None
    plan: StepPlan
    params: Sequence[Tensor]
    lora_E: Sequence[Tensor]
    due: Due | None = None

    @property
    def budget(self) -> int | Tensor:
        """The total rank that may stay: a number, or int32 [1] where the device decides."""
        return self.plan.budget if self.due is None else self.due.budget


class BudgetEngine:
    """The step of ``RankAllocator`` (which has the settings' meaning) in parts, for optimizers that do some of them:

        turn = allocator.begin(step)                 # the plan and the parameters
        finite = allocator.update(turn)              # or the optimizer's own, into allocator.importance
        threshold = allocator.finish(turn, finite)   # after the parameters' update

    What can go wrong raises in ``begin`` and ``update``, before anything has changed. ``update`` runs on the parameters
    as they are before the optimizer's update where ``pre_step`` is set, else as they are after it, and on the same
    gradients either way: accumulated, unscaled and clipped.

    Attributes:
        importance: averages, scores and pattern.
        triplets: the layers, in the order of the averages.
        clock: the schedule on the device, where ``capturable`` was asked for.
        check_ranks: whether ranks that train one model compare their masks after each ranking; see ``Agreement``.
        captured: set by who has recorded steps in a CUDA graph, which holds the parameters' addresses and shapes.
    """

    total_rank: int
    target_rank: int
    initial_warmup: int
    final_warmup: int
    mask_interval: int
    total_step: int | None
    beta1: float
    beta2: float
    tb_writter: Any
    log_interval: int

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None,
        variant: str,
        metric: str,
        reduction: str,
        backend: str | Backend | None,
        capturable: bool,
    ) -> None:
        for name, value, known in (
            ("variant", variant, VARIANTS),
            ("metric", metric, METRICS),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
        self.model, self.adapter = model, adapter
        self.variant, self.metric, self.reduction = variant, metric, reduction
        self.backend = parse(backend)
        self.triplets = self._find(model)
        if capturable:
            refuse_several_devices("capturable=True", self.triplets)
        self.importance = state_of(self.triplets)
        for state in self.importance.per_device():
            for op in ("importance", "allocation"):  # a backend that can't run says so here, not in mid-training
                select(op, state.live.device.type, state.scores.dtype, 0, self.backend)
        self._global_step = self._next_step = 0
        self.clock = DeviceClock(self.importance) if capturable else None
        self.captured = False
        self.fused: FusedImportance | None = None
        self.check_ranks = True
        self._agreement = Agreement()

    @property
    def global_step(self) -> int:
        """The last step that was finished, counted from 0. Waits for the device where that counts."""
        return self._global_step if self.clock is None else int(self.clock.steps[0])

    @property
    def next_step(self) -> int:
        """The step that comes next where nobody gives a number. Waits for the device where that counts."""
        return self._next_step if self.clock is None else int(self.clock.steps[1])

    def go_to(self, next_step: int, global_step: int | None = None) -> None:
        """Make ``next_step`` the one that comes next, and ``global_step`` the one that was finished last."""
        if self.clock is not None:
            self.clock.go_to(next_step, self.importance)
            if global_step is not None:
                self.clock.steps[:1].fill_(global_step)
        self._next_step = next_step
        self._global_step = self._global_step if global_step is None else global_step

    @property
    def pre_step(self) -> bool:
        """Whether importance reads the parameters before the optimizer's update (the paper's algorithm 1)."""
        return self.variant == "paper"

    @property
    def schedule(self) -> BudgetSchedule:
        """The schedule in force.

        Raises:
            ValueError: ``total_step`` was never set.
        """
        if self.total_step is None:
            raise ValueError("total_step: expected the number of optimizer steps, got None; call set_total_step first")
        return self._schedule(self.total_step)

    def _schedule(self, total_step: int) -> BudgetSchedule:
        """Built anew at each use, since PEFT's users change these settings while training."""
        return BudgetSchedule(
            total_step,
            self.initial_warmup,
            self.final_warmup,
            self.mask_interval,
            self.total_rank,
            self.target_rank,
            self.variant,
        )

    def _find(self, model: nn.Module) -> list[Triplet]:
        triplets = find_triplets(model, self.adapter)
        if not triplets:
            raise no_triplets(model, self.adapter)
        for t in triplets:
            devices = sorted({str(p.device) for p in t.parameters})
            if len(devices) > 1:
                raise ValueError(
                    f"model: expected A, E and B of each layer on one device, found those of {t.name} on "
                    f"{', '.join(devices)}; move the layer as a whole"
                )
        return triplets

    @property
    def triplets(self) -> list[Triplet]:
        """The layers, in the order of their averages."""
        return self._triplets

    @triplets.setter
    def triplets(self, triplets: list[Triplet]) -> None:
        self._triplets, self._lookup = triplets, Lookup([slot for t in triplets for slot in t.slots])

    def parameters(self) -> list[nn.Parameter]:
        """A, E and B of each layer, as they are now."""
        return self._lookup()

    def bind(self, model: nn.Module) -> None:
        """Follow ``model``'s parameters from now on: a copy of the same layers, or layers whose parameters were
        replaced or moved.

        Raises:
            ValueError: its layers have other shapes, or lie on several devices with ``capturable`` or
                ``fuse_backward``; nothing changes.
        """
        triplets = self._find(model)
        if [t.shape for t in triplets] != list(self.importance.layout.shapes):
            raise ValueError("model: expected the layers that this allocator was made for, found other shapes")
        if self.clock is not None or self.fused is not None:
            refuse_several_devices("capturable=True or fuse_backward()", triplets)
        self.importance = follow_devices(self.importance, triplets)
        self.model, self.triplets = model, triplets
        if self.clock is not None:
            self.clock.move_to(triplets[0].lora_E.device)

    def begin(self, step: int | None = None, params: Sequence[Tensor] | None = None) -> Turn:
        """What ``step`` does, and the parameters that it does it to.

        Args:
            step: the optimizer step, counted from 0; None for the next one.
            params: A, E and B of each layer in the order of ``triplets``, where the caller has them; else looked up.

        Raises:
            TypeError: ``step`` is no integer.
            ValueError: a negative step; ``total_step`` is not set; a step that ranks, with a frozen layer; sharded
                parameters where the device decides.
        """
        schedule, clock = self.schedule, self.clock
        if clock is not None:
            plan = StepPlan(schedule.initial_rank, update=True, rank=True)
        else:
            step = self._next_step if step is None else _whole(step)
            plan = schedule.plan(step, self.importance.settled)
        if params is None:
            params = self.parameters()
            self.importance = follow_shards(self.importance, self.triplets, params)
        if plan.rank:
            self._check_trainable(params[1::3])
        if clock is None:
            return Turn(step, plan, params, params[1::3])
        if isinstance(self.importance, ShardedState):
            raise ValueError("capturable: expected a model with whole parameters, found sharded ones")
        clock.follow(schedule, self.importance)
        return Turn(None, plan, params, params[1::3], clock.due(step, self.importance))

    def update(self, turn: Turn, found_inf: Tensor | None = None) -> Tensor | None:
        """Take the gradients into Ī, Ū and the scores, where ``turn.plan.update`` says so.

        Who does this elsewhere writes to ``importance`` (``averages``, ``half`` and ``scores``) as
        ``ops.importance_update`` would.

        Args:
            turn: of ``begin``.
            found_inf: one element, not 0 where the optimizer skips this step, whatever the adapters' gradients are.

        Returns:
            bool [1]: whether it was taken, all being finite; None where this step takes none or no parameter has a
            gradient.
        """
        if turn.due is None:
            return self._update(turn, found_inf)
        before = position(self.importance)
        taken = self._update(turn, found_inf)
        go_back_unless(turn.due.update, self.importance, before)
        return taken

    def _update(self, turn: Turn, found_inf: Tensor | None) -> Tensor | None:
        taken = self.fused_update(turn, gradients_final=found_inf is None)
        if taken is not None or not turn.plan.update:
            return taken
        grads = [p.grad for p in turn.params]
        if not any(grad is not None for grad in grads):
            return None
        state = self.importance
        before = None if found_inf is None else position(state)
        finite = state.update(turn.params, grads, self.beta1, self.beta2, self.backend)
        if found_inf is None or before is None:
            return finite
        taken = (found_inf == 0).reshape(1).to(state.half.device)
        go_back_unless(taken, state, before)
        return finite & taken

    def fused_update(self, turn: Turn, gradients_final: bool) -> Tensor | None:
        """What the backward has done of ``update``, as that returns it; None where it is still to be done.

        Args:
            turn: of ``begin``.
            gradients_final: False where the optimizer clips or unscales the gradients without writing them.
        """
        if self.fused is None:
            return None
        if not turn.plan.update or not gradients_final:
            self.fused.reset("the optimizer clips or unscales the gradients" if turn.plan.update else "")
            return None
        return self.fused.collect(turn.params)

    def finish(self, turn: Turn, finite: Tensor | None) -> Tensor | None:
        """Mask as the plan says, and log. The parameters have been updated.

        Args:
            turn: of ``begin``.
            finite: what ``update`` returned: where it holds False, the masks stay as they are. From T - t_f on no
                gradient counts, and the masks follow the averages alone.

        Returns:
            The threshold, 0-d on the first layer's device, or None if nothing was ranked.
        """
        plan, state, due = turn.plan, self.importance, turn.due
        if due is not None and self.clock is not None:
            taken = None if finite is None else finite | ~due.update
            scores, enabled = self._scores(turn, taken)
            return self.clock.finish(due, state, scores, turn.lora_E, finite is not None, enabled, self.backend)
        assert turn.step is not None
        self._global_step, self._next_step = turn.step, turn.step + 1
        if finite is not None:
            state.updates += 1
        threshold = None
        if plan.rank and state.updates > 0:
            scores, enabled = self._scores(turn, finite)
            threshold = state.threshold = state.mask(scores, turn.lora_E, plan.budget, enabled, self.backend)
            if self.check_ranks:
                self._agreement.check(self, turn.step)
        elif plan.rank or plan.reapply:
            state.zero_pruned(turn.lora_E, self.backend)
        state.settled = plan.settle or (state.settled and plan.reapply)  # not so where the schedule was prolonged
        if plan.reset:
            state.reset()
        if self.tb_writter is not None and turn.step % self.log_interval == 0:
            write_scalars(self.tb_writter, self, threshold, turn.step)
        return threshold

    def _scores(self, turn: Turn, finite: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """S by ``metric`` and ``reduction``, and whether to mask by it (parameters may be anything)."""
        if self.metric == "ipt" and self.reduction == "mean":
            return self.importance.scores, finite
        scores = self.importance.other_scores(self.metric, self.reduction, turn.params)
        enabled = scores.isfinite().all().reshape(1)
        return scores.nan_to_num(), enabled if finite is None else enabled & finite

    def explain_importance(self) -> tuple[str, str, str]:
        """Backend, plan and reason of the importance update, for ``explain``."""
        chosen = select("importance", self.importance.live.device.type, self.importance.scores.dtype, 0, self.backend)
        if self.fused is None:
            when = "before" if self.pre_step else "after"
            devices = len(self.importance.per_device())
            where = "" if devices == 1 else f" on each of {devices} devices"
            return chosen.backend.value, chosen.plan, f"{chosen.reason}; launched {when} the optimizer's step{where}"
        return chosen.backend.value, chosen.plan, f"{chosen.reason}; last step: {self.fused.outcome}"

    def live_ranks(self) -> dict[str, int]:
        """The live rank of each layer by its path. Waits for the device."""
        return {t.name: sum(row) for t, row in zip(self.triplets, self.importance.pattern(), strict=True)}

    def _check_trainable(self, singular_values: Sequence[Tensor]) -> None:
        """A layer frozen since would score lowest for want of gradients, and lose what it has learnt."""
        trains = [E.requires_grad for E in singular_values]
        if all(trains) or not any(trains):
            return
        trains = [train or not E.numel() for train, E in zip(trains, singular_values, strict=True)]
        for triplet, train in zip(self.triplets, trains, strict=True):
            if not train:
                raise ValueError(
                    f"model: expected every adapted layer to train, but {triplet.parameter_names[1]} is frozen and "
                    "would be pruned; unfreeze it, or make a new RankAllocator, which leaves it out"
                )


def _whole(step: int) -> int:
    """Integers of other kinds (NumPy's, a tensor's) as Python's, which go into checkpoints."""
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(f"step: expected an integer, the optimizer step counted from 0, got {step!r}") from None


__all__ = ["METRICS", "BudgetEngine", "Turn"]
