"""``RankAllocator``: the rank budget of a whole model, step by step (AdaLoRA, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_kernels.allocator.attach import Attachment, innermost
from adalora_kernels.allocator.compact import Rows, check_carriable, refuse_wrapped, shrink, spread
from adalora_kernels.allocator.engine import BudgetEngine, Turn
from adalora_kernels.allocator.fused import FusedImportance
from adalora_kernels.allocator.placement import state_of
from adalora_kernels.allocator.saved import check_saved_allocator
from adalora_kernels.allocator.tensorboard import check_writer
from adalora_kernels.allocator.watch import called, watch
from adalora_kernels.allocator.zero import ZeroAttachment, zero_optimizer
from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.checks import check_number, check_share


class RankAllocator(BudgetEngine):
    """Scores every singular triplet of a model and zeroes the least important ones down to a budget.

    Either ``attach(optimizer)`` once, or call ``update_and_mask(model, step)`` after each ``optimizer.step()`` and
    before ``zero_grad()``, with steps counted from 0. Everything but the schedule stays on the parameters' devices, of
    which there may be several (``device_map="auto"``): scores meet on the first layer's. No step waits for a device.

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
        variant: "original"; "peft", which ranks once at T - t_f and then keeps to that pattern; or "paper", whose
            importance reads the parameters before the optimizer's update: without ``attach``, call
            ``update_importance`` before ``optimizer.step()`` there. The paper's orthogonality term is
            ``compute_orth_regu(model, γ, squared=True)``.
        metric: what an element's score is: "ipt", sensitivity times uncertainty, or "mag", |θ|.
        reduction: what becomes of the scores of a row of A or a column of B: "mean" or "sum".
        adapter: PEFT's adapter name; None takes what trains.
        backend: of importance and masking: "reference", "native", "triton", or None for the best that can run.
        capturable: keep step and schedule on the device, so that a CUDA graph can hold the allocator's steps (see
            ``graphed_step``). Every step then launches the same work and expects gradients; budgets and thresholds are
            tensors, the latter NaN where nothing was ranked; ranks don't compare their masks. To read ``global_step``
            or ``next_step`` waits for the device.

    Attributes:
        kept: for each layer, which of its first rows ``compact`` has left; None before that.

    Raises:
        TypeError, ValueError: a model without such layers, a layer on several devices (or layers, with ``capturable``),
            or a setting that is not of its kind or out of its range; named in the message.
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
        metric: str = "ipt",
        reduction: str = "mean",
        adapter: str | None = None,
        backend: str | Backend | None = None,
        capturable: bool = False,
    ) -> None:
        numbers = {"lora_r": lora_r, "target_rank": target_rank, "init_warmup": init_warmup,
                   "final_warmup": final_warmup, "beta1": beta1, "beta2": beta2}  # fmt: skip
        for name, value in numbers.items():
            check_share(name, value) if name.startswith("beta") else check_number(name, value)
        if lora_r < 0:
            raise ValueError(f"lora_r: expected at least 0, got {lora_r}")
        check_writer(tb_writter, tb_writter_loginterval, capturable)
        super().__init__(model, adapter, variant, metric, reduction, backend, capturable)
        self.lora_init_rank = lora_r
        self.total_rank = lora_r * len(self.triplets) if variant == "peft" else self.importance.layout.total_rank
        self.target_rank = target_rank * len(self.triplets) if target_total_rank is None else target_total_rank
        self.initial_warmup = init_warmup
        self.final_warmup = final_warmup
        self.mask_interval = mask_interval
        self.beta1 = beta1
        self.beta2 = beta2
        self.total_step = total_step
        self.tb_writter = tb_writter
        self.log_interval = tb_writter_loginterval
        self.kept: list[list[bool]] | None = None
        self._attachment: Attachment | None = None
        self._measured: tuple[Turn, Tensor | None] | None = None
        self._handled: tuple[int | None, tuple[int | Tensor, Tensor | None]] | None = None
        # With T not known yet, the longest schedule stands in for it: every other setting is checked now.
        self._schedule(int(init_warmup + final_warmup) + 1 if total_step is None else total_step)
        watch(self, self.triplets[0].slots[1], "RankAllocator was made", "allocator.attach(optimizer)")

    def set_total_step(self, total_step: int) -> None:
        """Set T.

        Raises:
            ValueError: T is not above the two warm-ups together; nothing changes.
        """
        self._schedule(total_step)
        self.total_step = total_step

    def update_and_mask(self, model: nn.Module, global_step: int) -> tuple[int | Tensor, Tensor | None]:
        """Take this step's gradients into the averages and mask as the schedule says.

        Where an attached optimizer or a callback has done that for this step already, nothing more is done. A step that
        a GradScaler skips for a gradient of another parameter can't be told from here: ``attach`` sees it.

        Args:
            model: the model, as at construction.
            global_step: the optimizer step that was just made, counted from 0.

        Returns:
            The budget at this step, and the threshold, 0-d on the first layer's device, or None if nothing was ranked.
            (The original returns a Python number, which waits for the device.)

        Raises:
            ValueError: no parameter has a gradient where one is needed, that is, ``backward`` was not called or the
                gradients are already cleared; ``total_step`` is not set; a layer was frozen; variant "paper" without
                ``update_importance`` before the optimizer's step; or another step than was made. Nothing changes.
        """
        if self.captured and self.clock is not None:
            return self.clock.budget, self.clock.threshold
        if self._handled is not None:
            step, result = self._handled
            if step is not None and step != global_step:
                raise ValueError(
                    f"global_step: expected {step}, which the attached optimizer or the callback has made, got "
                    f"{global_step}; leave this call out, or give your own count to attach(optimizer, step=...), or to "
                    "allocator.expect(step) before the optimizer's step"
                )
            self._handled = None
            return result
        turn, finite = self._measure(model, global_step, before_step=False)
        return turn.budget, self.finish(turn, finite)

    def update_importance(self, model: nn.Module, global_step: int) -> None:
        """Variant "paper" without ``attach``: call it before ``optimizer.step()``, on unscaled and clipped gradients.

        Args:
            model: the model, as at construction.
            global_step: the optimizer step that is about to be made, counted from 0.

        Raises:
            ValueError: another variant, whose importance reads the parameters after the step; an attached optimizer,
                which would take the gradients again; or as ``update_and_mask``. Nothing changes.
        """
        if not self.pre_step:
            raise ValueError(f"variant: expected 'paper', which alone scores before the step, got {self.variant!r}")
        if self.attached:
            raise ValueError("update_importance: the attached optimizer's step does it; leave this call out, or detach")
        self._measured = self._measure(model, global_step, before_step=True)

    def _measure(self, model: nn.Module, step: int, before_step: bool) -> tuple[Turn, Tensor | None]:
        measured = self._measured
        if measured is not None and measured[0].step in (step, None) and not before_step:
            self._measured = None
            return measured
        bound_to = self.model
        if model is not bound_to:
            self.bind(model)
        try:
            turn = self.begin(step)
            if turn.plan.update and self.pre_step and not before_step:
                raise ValueError(
                    f"variant 'paper' scores the parameters before optimizer.step(): expected update_importance(model, "
                    f"{step}) before it, or attach(optimizer)"
                )
            finite = self.update(turn)
            if turn.plan.update and finite is None:
                raise ValueError(
                    "model: expected gradients, found none; call update_and_mask after backward() and before "
                    "zero_grad()"
                )
        except ValueError:
            if bound_to is not self.model:
                self.bind(bound_to)
            raise
        return turn, finite

    def advance(self, model: nn.Module, step: int) -> None:
        """``update_and_mask`` for whoever calls by itself, such as a Trainer's callback: where somebody else has made
        this step, nothing is done, and who calls afterwards finds it done.

        Raises:
            ValueError: as ``update_and_mask``.
        """
        if self.next_step != step + 1:
            self.expect(step)
            self.note(step, self.update_and_mask(model, step))

    def fuse_backward(self, enabled: bool = True) -> None:
        """Variant "paper": let each layer's backward take its gradients into the averages, on a CPU while they are in
        the cache, on a GPU before they leave the registers.

        Where a gradient is not final when its layer's backward ends (clipping, a reduction, a loss scale, a hook, a
        module that runs twice), the launch before the optimizer's step does it over, with equal results: on a CPU the
        whole model, on a GPU the parameters in question. ``explain(allocator)`` says which it was; on a GPU, where
        nothing waits while training, it asks the device. An orthogonality term joins in with ``accumulate=True``.

        Off by default: what it saves on a GPU is calculated (``allocator.fused``), and no device has timed it.

        Raises:
            RuntimeError: the backend of importance can't run; the reason is named.
            ValueError: another variant, which reads the parameters after the step; or layers on several devices.
        """
        if not self.pre_step:
            raise ValueError(f"variant: expected 'paper', which alone scores before the step, got {self.variant!r}")
        if self.fused is not None:
            self.fused.stop()
        self.fused = FusedImportance(self) if enabled else None

    def expect(self, step: int) -> None:
        """The optimizer step that is about to be made is ``step``, by the caller's own count from 0."""
        self.go_to(step)
        self._handled = None

    def note(self, step: int | None, result: tuple[int | Tensor, Tensor | None]) -> None:
        """``step`` has been made by somebody who calls by itself; ``result`` is what ``update_and_mask`` answers."""
        self._handled = step, result

    def begin(self, step: int | None = None, params: Sequence[Tensor] | None = None) -> Turn:
        """As ``BudgetEngine.begin``."""
        self._handled = None
        return super().begin(step, params)

    def finish(self, turn: Turn, finite: Tensor | None) -> Tensor | None:
        """As ``BudgetEngine.finish``."""
        called(triplet.slots[1] for triplet in self.triplets)
        return super().finish(turn, finite)

    def attach(self, optimizer: Any, step: Callable[[], int] | None = None) -> Attachment:
        """Make every step of ``optimizer`` a step of this allocator: importance and masks then need no call.

        Args:
            optimizer: any of torch's kind that holds the adapters. Under ``torch.amp.GradScaler`` an overflow step
                leaves averages and masks alone, and an optimizer that unscales by itself (``fused=True``) finds its
                gradients unscaled. With DeepSpeed ZeRO give the engine, or accelerate's optimizer.
            step: gives the number of the optimizer step that is being made, from 0, where the caller counts; else
                steps are counted here, from ``next_step`` on.

        Returns:
            A handle; ``detach()``, or leaving it as a context manager, undoes this.

        Raises:
            TypeError: not an optimizer, or ``step`` is no function.
            ValueError: it holds no adapter of this model, or the allocator is attached to another one.
        """
        if step is not None and not callable(step):
            raise TypeError(f"step: expected a function that gives its number, got {step!r:.60}")
        attachment, zero = self._attachment, zero_optimizer(optimizer)
        if zero is None and isinstance(optimizer, nn.Module):  # an engine without ZeRO
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if attachment is not None and attachment.active:
            if attachment.is_to(optimizer):
                return attachment
            raise ValueError("optimizer: expected the one that is attached already; detach() that first")
        self._attachment = Attachment(self, optimizer, step) if zero is None else ZeroAttachment(self, zero, step)
        return self._attachment

    @property
    def attached(self) -> bool:
        """Whether an optimizer's steps drive this."""
        return self._attachment is not None and self._attachment.active

    def compact(self, optimizer: Optimizer | None = None, *, like: dict[str, Any] | None = None) -> dict[str, int]:
        """Shrink the layers to their live rank for good: live rows of A and E, columns of B.

        For the final phase, where the pattern no longer changes. Outputs stay the same up to the rounding of a sum that
        has lost terms of 0; c stays, as ``ranknum`` does; a layer with no rank left is the frozen linear. What comes
        after is the same training only without orthogonality term and gradient clipping: in both of them dead rows
        count. Waits for the device.

        Args:
            optimizer: whose moments are to follow (and whose parameters stay the same objects); None takes the attached
                one. Any other that has moments of the adapters fails at its next step.
            like: a ``state_dict()`` that was saved after ``compact``. A run that is to continue from there makes model,
                allocator and optimizer as the first one did, then calls this, and then loads the three states.

        Returns:
            The rank of each layer by its path.

        Raises:
            ValueError: before the final phase's first ranking; after DDP, FSDP or DeepSpeed has the model, or a CUDA
                graph its addresses; an optimizer whose state can't follow; or ``like`` is of another model. Nothing
                changes.
        """
        if self.captured:
            raise ValueError("model: expected compact() before steps are captured in a CUDA graph")
        self._write_back()
        if optimizer is None and self._attachment is not None and self._attachment.active:
            optimizer = self._attachment.optimizer
        rows = self._final_rows() if like is None else self._rows_like(like)
        refuse_wrapped(self.model, self.triplets)
        if optimizer is not None:
            optimizer = innermost(optimizer)
            check_carriable(self.triplets, optimizer)
        self._shrink(rows, optimizer)
        return self.live_ranks()

    def _shrink(self, rows: Rows, optimizer: Optimizer | None) -> None:
        if self.fused is not None:  # nothing more is taken in the final phase
            self.fuse_backward(False)
        shrink(self.model, self.triplets, rows, optimizer)
        self.importance = self.importance.shrunk(state_of(self.triplets), rows)
        self.kept = self._spread(rows)

    def _final_rows(self) -> Rows:
        if not self.importance.settled:
            raise ValueError(
                f"step: expected the final phase, that is, a ranking at or after step {self.schedule.pruning_end}; "
                f"got to step {self.global_step}"
            )
        return self.importance.pattern()

    def _rows_like(self, state: dict[str, Any]) -> Rows:
        check_saved_allocator(state)
        ranks = [r for r, _, _ in self.importance.layout.shapes]
        rows: Rows = state["kept"] or [[True] * r for r in ranks]
        if self.kept is not None or [len(row) for row in rows] != ranks:
            raise ValueError("like: expected the state of a model that had this one's layers before compact()")
        return rows

    def get_rank_pattern(self) -> dict[str, list[bool]]:
        """Which triplets live, by the name of each layer's E. Waits for the device.

        After ``compact`` the rows are still those that a layer had at first. (The original holds numbers, and only
        where a TensorBoard writer is given; ``live_ranks`` has the numbers.)
        """
        rows = self._spread(self.importance.pattern())
        return {t.parameter_names[1]: row for t, row in zip(self.triplets, rows, strict=True)}

    def _spread(self, rows: Rows) -> list[list[bool]]:
        if self.kept is None:
            return [list(row) for row in rows]
        return [spread(row, kept) for row, kept in zip(rows, self.kept, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: averages, scores, pattern, step; ``capturable`` or not."""
        self._write_back()
        settings = {"variant": self.variant, "metric": self.metric, "reduction": self.reduction}
        steps = {"global_step": self.global_step, "next_step": self.next_step}
        return {**settings, **steps, "kept": self.kept, **self.importance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: it is incomplete or corrupt, of another variant, metric or reduction, or of layers with other
                shapes; nothing changes.
        """
        check_saved_allocator(state)
        for name in ("variant", "metric", "reduction"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state: expected {name} {getattr(self, name)!r}, got {state[name]!r}")
        if state["kept"] != self.kept:
            raise ValueError(
                "state: expected that of layers compacted alike; where it was saved after compact(), call "
                "compact(like=state) first"
            )
        self.importance.load_state_dict(state)
        if self.fused is not None:
            self.fused.reset("a state was loaded after the backward")
        if self.clock is not None:
            self.clock.follow_state(self.importance)
        self.go_to(state["next_step"], state["global_step"])
        self._measured = self._handled = None

    def _write_back(self) -> None:
        if self.clock is not None:
            self.clock.write_back(self.importance)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to nothing, and no step of it is under way."""
        return {**self.__dict__, "_attachment": None, "_measured": None, "_handled": None, "fused": None}


__all__ = ["RankAllocator"]
