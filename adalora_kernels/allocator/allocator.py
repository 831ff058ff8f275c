"""``RankAllocator``: the rank budget of a whole model, step by step (AdaLoRA, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from adalora_kernels.allocator.schedule import VARIANTS, BudgetSchedule, StepPlan
from adalora_kernels.allocator.state import ImportanceState, check_keys
from adalora_kernels.allocator.tensorboard import write_scalars
from adalora_kernels.allocator.triplets import Triplet, find_triplets
from adalora_kernels.backends.select import Backend, parse, select
from adalora_kernels.ops.allocation import mask_to_budget, zero_pruned
from adalora_kernels.ops.importance import importance_update
from adalora_kernels.ops.orthogonality import orthogonality_loss


class Turn(NamedTuple):
    """One step of the allocator, from ``begin`` to ``finish``.

    Attributes:
        step: its number, counted from 0.
        plan: what it does.
        params: A, E and B of each layer, as they are in this step.
        lora_E: the E among them.
    """

    step: int
    plan: StepPlan
    params: Sequence[Tensor]
    lora_E: Sequence[Tensor]


class RankAllocator:
    """Scores every singular triplet of a model and zeroes the least important ones down to a budget.

    Call ``update_and_mask(model, step)`` after ``optimizer.step()`` and before ``zero_grad()``, with steps counted
    from 0. Everything but the schedule stays on the parameters' device; no step waits for the device.

    A step with a gradient that is not finite leaves averages, pattern and E as they were. A parameter without a
    gradient keeps its averages.

    Args:
        model: holds the layers; any with lora_A, lora_E, lora_B (ours, the original's, PEFT's).
        lora_r: the initial rank of each layer. Under variant "peft" b⁰ is this times the number of layers.
        target_rank: the mean rank of a layer at the end; b^T is this times the number of layers.
        init_warmup: t_i, steps before pruning starts.
        final_warmup: t_f, steps after it has ended.
        mask_interval: ΔT, steps from one ranking to the next.
        beta1, beta2: smoothing of sensitivity and of uncertainty, in (0, 1).
        total_step: T; may be given later, through ``set_total_step``.
        target_total_rank: b^T itself, in place of ``target_rank``.
        tb_writter: a TensorBoard SummaryWriter, or None.
        tb_writter_loginterval: steps from one record to the next.
        variant: "original" or "peft"; see ``BudgetSchedule``.
        adapter: PEFT's adapter name; None takes what trains.
        backend: of importance and masking: "reference", "native", or None for the best that can run.

    Raises:
        ValueError: a model without such layers, layers on several devices, or a setting out of its range; named in the
            message.
    """

    def __init__(
        self,
        model: nn.Module,
        lora_r: int,
        target_rank: int,
        init_warmup: int,
        final_warmup: int,
        mask_interval: int,
        beta1: float,
        beta2: float,
        total_step: int | None = None,
        target_total_rank: int | None = None,
        tb_writter: Any = None,
        tb_writter_loginterval: int = 500,
        *,
        variant: str = "original",
        adapter: str | None = None,
        backend: str | Backend | None = None,
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {beta}")
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}; got {variant!r}")
        if lora_r < 0:
            raise ValueError(f"lora_r: expected at least 0, got {lora_r}")
        if tb_writter_loginterval < 1:
            raise ValueError(f"tb_writter_loginterval: expected at least 1, got {tb_writter_loginterval}")
        self.model = model
        self.adapter = adapter
        self.variant = variant
        self.backend = parse(backend)
        self.triplets = self._find(model)
        self.importance = ImportanceState(self.triplets)
        for op in ("importance", "allocation"):  # a backend that can't run says so here rather than in mid-training
            select(op, self.importance.live.device.type, self.importance.averages.dtype, 0, self.backend)
        self.lora_init_rank = lora_r
        self.total_rank = lora_r * len(self.triplets) if variant == "peft" else self.importance.layout.total_rank
        self.target_rank = target_rank * len(self.triplets) if target_total_rank is None else target_total_rank
        self.initial_warmup = init_warmup
        self.final_warmup = final_warmup
        self.mask_interval = mask_interval
        self.beta1 = beta1
        self.beta2 = beta2
        self.total_step = total_step
        self.global_step = 0
        self.tb_writter = tb_writter
        self.log_interval = tb_writter_loginterval
        # With T not known yet, the longest schedule stands in for it: every other setting is checked now.
        self._schedule(init_warmup + final_warmup + 1 if total_step is None else total_step)

    def set_total_step(self, total_step: int) -> None:
        """Set T.

        Raises:
            ValueError: T is not above the two warm-ups together; nothing changes.
        """
        self._schedule(total_step)
        self.total_step = total_step

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

    @property
    def schedule(self) -> BudgetSchedule:
        """The schedule in force.

        Raises:
            ValueError: ``total_step`` was never set.
        """
        if self.total_step is None:
            raise ValueError("total_step: expected the number of optimizer steps, got None; call set_total_step first")
        return self._schedule(self.total_step)

    def _find(self, model: nn.Module) -> list[Triplet]:
        triplets = find_triplets(model, self.adapter)
        if not triplets:
            wanted = "" if self.adapter is None else f" for adapter {self.adapter!r}"
            raise ValueError(f"model: expected layers with lora_A, lora_E and lora_B{wanted}, found none")
        devices = sorted({str(p.device) for t in triplets for p in t.parameters})
        if len(devices) > 1:
            raise ValueError(f"model: expected its adapters on one device, found them on {', '.join(devices)}")
        return triplets

    def bind(self, model: nn.Module) -> None:
        """Follow ``model``'s parameters from now on: a copy of the same layers, or layers whose parameters were
        replaced.

        Raises:
            ValueError: its layers have other shapes; nothing changes.
        """
        triplets = self._find(model)
        if [t.shape for t in triplets] != list(self.importance.layout.shapes):
            raise ValueError("model: expected the layers that this allocator was made for, found other shapes")
        self.model, self.triplets = model, triplets
        self.importance.move_to(triplets[0].lora_E.device)

    def update_and_mask(self, model: nn.Module, global_step: int) -> tuple[int, Tensor | None]:
        """Take this step's gradients into the averages and mask as the schedule says.

        Args:
            model: the model, as at construction.
            global_step: the optimizer step that was just made, counted from 0.

        Returns:
            The budget at this step, and the threshold, 0-d on the parameters' device, or None if nothing was ranked.
            (The original returns a Python number, which waits for the device.)

        Raises:
            ValueError: no parameter has a gradient where one is needed, that is, ``backward`` was not called or the
                gradients are already cleared; ``total_step`` is not set; or a layer was frozen. Nothing changes.
        """
        bound_to = self.model
        if model is not bound_to:
            self.bind(model)
        try:
            turn = self.begin(global_step)
            finite = self.update(turn)
        except ValueError:
            if bound_to is not self.model:
                self.bind(bound_to)
            raise
        return turn.plan.budget, self.finish(turn, finite)

    # The parts of a step, for optimizers that update the importance themselves:
    #
    #     turn = allocator.begin(step)                 # the plan, and the parameters
    #     finite = allocator.update(turn)              # or the optimizer's own, into allocator.importance
    #     threshold = allocator.finish(turn, finite)   # after the parameters' update
    #
    # What can go wrong raises in ``begin`` and ``update``, before anything has changed.

    def begin(self, step: int, params: Sequence[Tensor] | None = None) -> Turn:
        """What ``step`` does, and the parameters that it does it to.

        Args:
            step: the optimizer step, counted from 0.
            params: A, E and B of each layer in the order of ``triplets``, where the caller has them; else looked up.

        Raises:
            ValueError: a negative step; ``total_step`` is not set; a step that ranks, with a frozen layer.
        """
        plan = self.schedule.plan(step, self.importance.settled)
        if params is None:
            params = [registry[key] for t in self.triplets for registry, key in t.slots]
        turn = Turn(step, plan, params, params[1::3])
        if plan.rank:
            self._check_trainable(turn.lora_E)
        return turn

    def update(self, turn: Turn) -> Tensor | None:
        """Take the gradients into Ī, Ū and the scores, where ``turn.plan.update`` says so.

        Who does this elsewhere writes to ``importance`` (``averages``, ``half`` and ``scores``) as
        ``ops.importance_update`` would.

        Returns:
            bool [1]: whether it was taken, all being finite; None where this step takes none.

        Raises:
            ValueError: no parameter has a gradient. Nothing changes.
        """
        if not turn.plan.update:
            return None
        grads = [p.grad for p in turn.params]
        if not any(grad is not None for grad in grads):
            raise ValueError(
                "model: expected gradients, found none; call update_and_mask after backward() and before zero_grad()"
            )
        state = self.importance
        return importance_update(
            state.layout,
            turn.params,
            grads,
            state.averages,
            state.half,
            state.scores,
            self.beta1,
            self.beta2,
            backend=self.backend,
        )

    def finish(self, turn: Turn, finite: Tensor | None) -> Tensor | None:
        """Mask as the plan says, and log. The parameters have been updated.

        Args:
            turn: of ``begin``.
            finite: bool [1], whether importance was updated, all being finite (where not, masks stay as they are);
                None where ``turn.plan.update`` is False.

        Returns:
            The threshold, 0-d on the parameters' device, or None if nothing was ranked.
        """
        plan, state = turn.plan, self.importance
        self.global_step = turn.step
        if plan.update:
            state.updates += 1
        threshold = None
        if plan.rank and state.updates > 0:
            threshold = mask_to_budget(state.scores, turn.lora_E, plan.budget, state.live, finite, backend=self.backend)
        elif plan.rank or plan.reapply:
            zero_pruned(state.live, turn.lora_E, backend=self.backend)
        state.settled |= plan.settle
        if plan.reset:
            state.reset()
        if self.tb_writter is not None and turn.step % self.log_interval == 0:
            write_scalars(self.tb_writter, self, threshold, turn.step)
        return threshold

    def _check_trainable(self, singular_values: Sequence[Tensor]) -> None:
        """A layer frozen since would score lowest for want of gradients, and lose what it has learnt."""
        trains = [E.requires_grad for E in singular_values]
        if all(trains) or not any(trains):
            return
        for triplet, train in zip(self.triplets, trains, strict=True):
            if not train:
                raise ValueError(
                    f"model: expected every adapted layer to train, but {triplet.parameter_names[1]} is frozen and "
                    "would be pruned; unfreeze it, or make a new RankAllocator, which leaves it out"
                )

    def reapply_pattern(self) -> None:
        """Zero E wherever the stored pattern has no live triplet."""
        zero_pruned(self.importance.live, [t.lora_E for t in self.triplets], backend=self.backend)

    def live_ranks(self) -> dict[str, int]:
        """The live rank of each layer by its path. Waits for the device."""
        return {t.name: sum(row) for t, row in zip(self.triplets, self._pattern(), strict=True)}

    def get_rank_pattern(self) -> dict[str, list[bool]]:
        """Which triplets live, by the name of each layer's E. Waits for the device.

        (The original holds numbers, and only where a TensorBoard writer is given; ``live_ranks`` has the numbers.)
        """
        return {t.parameter_names[1]: row for t, row in zip(self.triplets, self._pattern(), strict=True)}

    def _pattern(self) -> list[list[bool]]:
        flat = self.importance.live.tolist()
        offsets = self.importance.layout.rank_offsets
        return [flat[a:b] for a, b in pairwise(offsets)]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: averages, scores, pattern, step."""
        return {"global_step": self.global_step, "variant": self.variant, **self.importance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: it is incomplete or corrupt, of another variant or of layers with other shapes; nothing changes.
        """
        check_keys(state, ("variant", "global_step"))
        if state["variant"] != self.variant:
            raise ValueError(f"state: expected variant {self.variant!r}, got {state['variant']!r}")
        if type(state["global_step"]) is not int:
            raise ValueError(f"state['global_step']: expected an integer, got {state['global_step']!r}")
        self.importance.load_state_dict(state)
        self.global_step = state["global_step"]


def compute_orth_regu(model: nn.Module, regu_weight: float = 0.1, *, accumulate: bool = False) -> Tensor:
    """γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all adapted matrices of ``model``, differentiable, 0-d.

    ``accumulate`` adds its gradient in one launch when the backward ends; see ``ops.orthogonality_loss``.

    Raises:
        ValueError: a model without layers with lora_A, lora_E and lora_B, or a negative weight.
    """
    triplets = find_triplets(model)
    if not triplets:
        raise ValueError("model: expected layers with lora_A, lora_E and lora_B, found none")
    lora_A, lora_B = [t.lora_A for t in triplets], [t.lora_B for t in triplets]
    return orthogonality_loss(lora_A, lora_B, regu_weight, accumulate=accumulate)


__all__ = ["RankAllocator", "Turn", "compute_orth_regu"]
