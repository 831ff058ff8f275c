"""``AdaLoraAdamW``: torch's AdamW with the rank allocator inside, at one sweep over the adapters' memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from numbers import Real
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from adalora_kernels.allocator.allocator import RankAllocator
from adalora_kernels.allocator.capturable import go_back_unless, position
from adalora_kernels.allocator.engine import Turn
from adalora_kernels.backends.select import Backend, parse, select
from adalora_kernels.ops.adamw import Importance, adamw_update, total_norm
from adalora_kernels.ops.shards import are_sharded


class _Held(NamedTuple):
    """What one device's sweep reads and writes beside parameters and importance.

    Attributes:
        moments: [2, elements], of the adapters there, in fp32 (fp64 for fp64 parameters).
        steps: float32 [parameters], how often each was stepped.
        groups: int64 [parameters], the parameter group of each.
    """

    moments: Tensor
    steps: Tensor
    groups: Tensor


class AdaLoraAdamW(torch.optim.AdamW):
    """A drop-in for ``torch.optim.AdamW`` that scores and masks the adapters of a model as it steps them.

    The parameters A, E and B of the allocator's layers are clipped, stepped and scored in one sweep of 44 bytes an
    element, in place of 28 for AdamW, 24 for importance and 12 for clipping. Other parameters (a classifier's, say)
    take torch's own path. Don't call the allocator's ``update_and_mask`` besides.

    Both moments of all adapters lie in one flat tensor, of which ``state[p]["exp_avg"]`` and ``["exp_avg_sq"]`` are
    views: checkpoints are torch's, in both directions. They are fp32 for 16-bit parameters, where torch's are 16-bit.
    Adapters on several devices have one such tensor, and one sweep, on each.

    Args:
        params: as for ``torch.optim.AdamW``, all of the allocator's adapters that train among them.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``, each also per group.
        allocator: scores and masks, in the timing of its variant; each ``step()`` makes a step of its schedule.
        max_grad_norm: clip the norm of all gradients of this optimizer to this, as ``clip_grad_norm_`` does, but
            without writing the clipped gradients; None clips nothing.
        backend: of the sweep: "reference", "native", "triton", or None for the best that can run.
        capturable: so that a CUDA graph can hold the steps, with an allocator that is capturable too. ``lr`` is then a
            tensor on the device, which schedulers write to. No GradScaler: it is asked for an overflow by the host.

    Raises:
        ValueError: a setting out of its range, or an option of ``torch.optim.AdamW`` that the sweep doesn't have
            (amsgrad, maximize, differentiable).
    """

    # GradScaler then leaves the check for overflow and the unscaling to step().
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        allocator: RankAllocator,
        max_grad_norm: float | None = None,
        backend: str | Backend | None = None,
        capturable: bool = False,
        **options: Any,
    ) -> None:
        if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if not isinstance(allocator, RankAllocator):
            raise ValueError(f"allocator: expected a RankAllocator, got {type(allocator).__name__}")
        if capturable != (allocator.clock is not None):
            raise ValueError(f"capturable: expected {not capturable}, as its allocator has it, got {capturable}")
        super().__init__(params, lr, betas, eps, weight_decay, capturable=capturable, **options)
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "differentiable"):
                if group[option]:
                    raise ValueError(f"{option}: expected False, got True; AdaLoraAdamW doesn't have it")
        self.allocator = allocator
        self.max_grad_norm = max_grad_norm
        self.backend = parse(backend)
        for state in allocator.importance.per_device():
            select("adamw", state.live.device.type, state.scores.dtype, 0, self.backend)
        self._adapters: list[nn.Parameter] = []
        self._adopt({})

    def _adopt(self, moments: Mapping[Tensor, dict[str, Any]]) -> None:
        """Lay out the moments of the allocator's parameters as they are now, with what is known of them."""
        state = self.allocator.importance
        self._adapters = [p for t in self.allocator.triplets for p in t.parameters]
        if are_sharded(self._adapters):
            raise ValueError(
                "params: expected whole parameters, got DTensors; under fully_shard take torch.optim.AdamW and "
                "allocator.attach(optimizer)"
            )
        if len({id(p) for p in self._adapters}) < len(self._adapters):
            raise ValueError("params: expected adapters of their own for each layer, got one that several share")
        if self.allocator.clock is not None:
            for group in self.param_groups:
                group["lr"] = _on_device(group["lr"], state.live.device)
        self._table: tuple[list[list[float]], Tensor] | None = None
        rows = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._is_held = [p in rows for p in self._adapters]
        self._holds_all = all(self._is_held)
        adapters = set(self._adapters)
        self._others = [[p for p in group["params"] if p not in adapters] for group in self.param_groups]
        self._held: list[_Held] = []
        kept: dict[Tensor, dict[str, Any]] = {}
        for here, params in zip(state.per_device(), state.split(self._adapters), strict=True):
            held = _Held(
                here.averages.new_zeros(2, here.layout.total_elements),
                torch.zeros(len(params), dtype=torch.float32, device=here.live.device),
                torch.tensor([rows.get(p, 0) for p in params], device=here.live.device),
            )
            self._held.append(held)
            parts = held.moments.split(here.layout.sizes, 1)
            for p, part, step in zip(params, parts, held.steps, strict=True):
                if p not in rows:
                    continue
                first, second = part.view(2, *p.shape)
                kept[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
                for name, value in moments.get(p, {}).items():
                    if name in kept[p]:
                        kept[p][name].copy_(value)
        self.state.update(kept)
        # By which a later step sees that adapters were moved, groups exchanged, or state by copies of it.
        self._laid_for = state
        self._laid_out = [id(group) for group in self.param_groups]
        self._moments_shown = [(p, views["exp_avg"]) for p, views in (*kept.items(),)[:1]]

    def _current(self) -> Sequence[Tensor]:
        """The adapters' parameters, laid out anew where one was replaced."""
        params = self.allocator.parameters()
        same = len(params) == len(self._adapters) and all(map(is_, params, self._adapters))
        same &= self._laid_for is self.allocator.importance and self._laid_out == [
            id(group) for group in self.param_groups
        ]
        same &= all(self.state.get(p, {}).get("exp_avg") is shown for p, shown in self._moments_shown)
        if not same:
            self._adopt({p: self.state[p] for p in params if p in self.state})
        return params

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, step, score and mask.

        A step whose gradients overflowed under a GradScaler leaves parameters, averages and masks alone, and counts.
        Without a scaler a gradient that is not finite goes into the parameters, as with ``torch.optim.AdamW``, but
        leaves averages and masks alone.

        Raises:
            ValueError: no adapter has a gradient, one is not held or was frozen, the allocator's ``total_step`` is not
                set, or a GradScaler with ``capturable``. Nothing changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        allocator, params = self.allocator, self._current()
        if not self._holds_all and any(p.requires_grad and not h for p, h in zip(params, self._is_held, strict=True)):
            raise ValueError("params: expected all adapters of the allocator; those left out would be pruned")
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and allocator.clock is not None:
            raise ValueError("capturable: expected False under a GradScaler, got True")
        turn = allocator.begin(params=params)
        if found_inf is not None and found_inf.item():
            live = allocator.importance.live
            taken = live.new_zeros(1) if turn.plan.update else None  # in the final phase no gradient counts
            allocator.note(turn.step, (turn.budget, allocator.finish(turn, taken)))
            return loss
        grads = [p.grad for p in params]
        if not self._holds_all:
            grads = [g if held else None for g, held in zip(grads, self._is_held, strict=True)]
        others = [[p for p in some if p.grad is not None] for some in self._others]
        if turn.plan.update and not any(g is not None for g in grads):
            raise ValueError("params: expected gradients of the adapters, found none; call step() after backward()")
        scale = self._gradient_scale(grads, [p.grad for some in others for p in some])
        before = None if turn.due is None else position(allocator.importance)
        finite = self._sweep(turn, grads, scale)
        if turn.due is not None and before is not None:
            go_back_unless(turn.due.update, allocator.importance, before)
        for group, some in zip(self.param_groups, others, strict=True):
            if some:
                self._step_others(group, some, scale)
        allocator.note(turn.step, (turn.budget, allocator.finish(turn, finite)))
        return loss

    def _gradient_scale(self, grads: Sequence[Tensor | None], others: Sequence[Tensor]) -> Tensor:
        """What gradients are multiplied by: clipping and unscaling, fp64 [1] on the first layer's device."""
        scale = torch.ones(1, dtype=torch.float64, device=self._held[0].moments.device)
        loss_scale = getattr(self, "grad_scale", None)
        if loss_scale is not None:
            scale = scale / loss_scale.to(scale)
        if self.max_grad_norm is not None and (norms := self._norms(grads, others)):
            norm = norms[0] if len(norms) == 1 else torch.cat([n.to(scale.device) for n in norms]).square().sum().sqrt()
            scale = scale * torch.clamp(self.max_grad_norm / (norm * scale + 1e-6), max=1.0)
        return scale

    def _norms(self, grads: Sequence[Tensor | None], others: Sequence[Tensor]) -> list[Tensor]:
        """The norm of each device's gradients."""
        devices = [held.moments.device for held in self._held]
        found = [[g for g in some if g is not None] for some in self.allocator.importance.split(grads)]
        for g in others:
            if g.device not in devices:
                devices.append(g.device)
                found.append([])
            found[devices.index(g.device)].append(g)
        return [total_norm(some, backend=self.backend) for some in found if some]

    def _settings(self) -> Tensor:
        """Lr, weight decay, β₁, β₂, ε of each group, fp64: on the CPU, or on the device where that has the lr."""
        rows = [[0.0, *map(float, (g["weight_decay"], *g["betas"], g["eps"]))] for g in self.param_groups]
        if self.allocator.clock is None:
            rows = [[float(g["lr"]), *row[1:]] for g, row in zip(self.param_groups, rows, strict=True)]
            return torch.tensor(rows, dtype=torch.float64, device="cpu")  # whatever the default device
        if self._table is None or self._table[0] != rows:
            self._table = rows, torch.tensor(rows, dtype=torch.float64, device=self._held[0].moments.device)
        table = self._table[1]
        for row, group in zip(table, self.param_groups, strict=True):
            group["lr"] = _on_device(group["lr"], table.device)
            row[0].copy_(group["lr"])
        return table

    def _sweep(self, turn: Turn, grads: list[Tensor | None], scale: Tensor) -> Tensor | None:
        state = self.allocator.importance
        # What the sweep clips or unscales, the backward has not seen so.
        final = self.max_grad_norm is None and getattr(self, "grad_scale", None) is None
        taken = self.allocator.fused_update(turn, final)
        scores = turn.plan.update and taken is None
        options = self.allocator.beta1, self.allocator.beta2, self.allocator.pre_step
        settings, finite = self._settings(), []
        spread = state.per_device(), self._held, state.split(turn.params), state.split(grads)
        for here, held, params, some in zip(*spread, strict=True):
            finite.append(
                adamw_update(
                    here.layout,
                    params,
                    some,
                    *held,
                    settings,
                    scale.to(held.moments.device),
                    Importance(here.averages, here.half, here.scores, *options) if scores else None,
                    backend=self.backend,
                )
            )
        return state.agree(finite) if scores else taken

    def _step_others(self, group: dict[str, Any], params: list[nn.Parameter], scale: Tensor) -> None:
        """torch's own step of what is no adapter."""
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        # torch has no capturable step on a CPU, where nothing is captured and nothing waits.
        capturable = group["capturable"] and params[0].device.type != "cpu"
        has_complex = self._init_group({**group, "params": params}, *lists)
        with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        if self.max_grad_norm is not None or getattr(self, "grad_scale", None) is not None:
            grads = [g * scale.to(g.device, g.dtype).reshape(()) for g in grads]
        adamw(
            with_grad,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            foreach=group["foreach"],
            capturable=capturable,
            differentiable=False,
            fused=group["fused"],
            has_complex=has_complex,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] if capturable or not group["capturable"] else float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "AdaLoraAdamW can't be copied or pickled with its allocator; make a new one and load state_dict()"
        )

    def parameters_resized(self) -> None:
        """``RankAllocator.compact`` has shrunk parameters and their state: the next step lays them out anew."""
        self._adapters = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; adapters among its parameters join the sweep."""
        super().add_param_group(param_group)
        if hasattr(self, "_adapters"):
            self._adopt(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of this class or of ``torch.optim.AdamW``; fp32 moments stay what they are.

        Raises:
            ValueError: it is another optimizer's, or of parameters with other shapes; nothing changes.
        """
        self._check_state_dict(state_dict)
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["capturable"] = self.allocator.clock is not None
            lr = float(group["lr"])
            group["lr"] = rate.fill_(lr) if isinstance(rate, Tensor) else lr
        saved = state_dict["state"]
        self._adopt({p: saved[i] for i, p in self._saved_parameters(state_dict) if i in saved})

    def _saved_parameters(self, state_dict: dict[str, Any]) -> Iterable[tuple[int, nn.Parameter]]:
        """The parameters with their numbers in ``state_dict``."""
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        return zip(ids, chain.from_iterable(group["params"] for group in self.param_groups), strict=False)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What torch doesn't look at; the number of groups and of their parameters it does."""
        if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
            raise ValueError(f"state_dict: expected what state_dict() returned, got {state_dict!r:.60}")
        for name in ("lr", "betas", "eps", "weight_decay"):
            if any(name not in group for group in state_dict["param_groups"]):
                raise ValueError(f"state_dict: expected that of an AdamW, found no {name!r} in its groups")
        for i, p in self._saved_parameters(state_dict):
            for name in ("exp_avg", "exp_avg_sq"):
                value = state_dict["state"].get(i, {}).get(name)
                if value is not None and value.shape != p.shape:
                    raise ValueError(
                        f"state_dict: expected {name!r} of parameter {i} as {list(p.shape)}, got {list(value.shape)}; "
                        "take the state of this model's optimizer"
                    )


def _on_device(lr: float | Tensor, device: torch.device) -> Tensor:
    """A tensor that is there already stays the same, for the sake of who holds it."""
    if isinstance(lr, Tensor) and lr.device == device:
        return lr
    return torch.tensor(float(lr), dtype=torch.float64, device=device)


__all__ = ["AdaLoraAdamW"]
