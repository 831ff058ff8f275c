"""Layers of one module that read the same tensor (q, k, v; gate, up), computed together where they do.

Which ones do is learned from their calls: the first to be called with an x computes it for those that read the same x
after it the last time, and each of them then finds its output, if it is called with that very tensor, unchanged, and
would compute the same. Otherwise it runs alone. Outputs that wait are held within one forward of the parent module:
until the next x, or until x dies, at the latest until that forward ends.

Where gradients are on, what was learned applies from the next update of the adapter on: a recomputation in the backward
(activation checkpointing) repeats what its forward did. While a CUDA graph is captured, nothing begins to apply: the
kernels of a group that no run before has launched could not be loaded.
"""

from __future__ import annotations

import weakref
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from adalora_kernels.backends.select import Backend, Selection, select
from adalora_kernels.integrations.svd_layer import FusedSVDLinear, GroupCall
from adalora_kernels.ops.explain import NOMINAL_TOKENS, explain_group_call
from adalora_kernels.ops.svd_linear import compute_dtype_of
from adalora_kernels.ops.svd_linear_group import GroupedLayer, shares_passes, svd_linear_group


class _Turn(NamedTuple):
    """When in a forward of the parent: a layer's name, and that of the one called before it ("" for none)."""

    before: str
    name: str


class _Reading:
    """One x, from its first reader on.

    Attributes:
        x: weakly; its end takes the outputs with it.
        turn: of the first reader.
        waiting: outputs that were computed ahead, with the calls that they answer.
    """

    def __init__(self, x: Tensor, turn: _Turn) -> None:
        self.waiting: dict[str, tuple[GroupCall, Tensor]] = {}
        waiting = self.waiting
        self.x = weakref.ref(x, lambda _: waiting.clear())
        self.turn = turn
        self._state = _state(x)

    def is_of(self, x: Tensor) -> bool:
        """Whether a call with ``x`` reads the same values in the same way."""
        return self.x() is x and self._state == _state(x)


def _state(x: Tensor) -> tuple[Any, ...]:
    return x._version, torch.is_grad_enabled(), compute_dtype_of(x)


_Asked = tuple[_Turn, tuple[str, ...], int, torch.dtype, bool, bool]


def _asked(turn: _Turn, followers: tuple[str, ...], x: Tensor) -> _Asked:
    """What decides whether a group pays: who is in it, the order of magnitude of x, whether gradients are needed."""
    return turn, followers, x.numel().bit_length(), x.dtype, x.requires_grad, torch.is_grad_enabled()


class _Frame:
    """One forward of the parent under way: the parent, which may be a replica, and the followers of each turn."""

    def __init__(self, parent: nn.Module, followers: dict[_Turn, tuple[str, ...]]) -> None:
        self.parent = parent
        self.followers = followers
        self.before = ""
        self.reading: _Reading | None = None

    def name_of(self, layer: nn.Module, names: tuple[str, ...]) -> str | None:
        """The layer's name in the parent."""
        modules = self.parent._modules
        return next((name for name in names if modules.get(name) is layer), None)


class _Updates:
    """Counts the steps of all optimizers: torch's fused ones write to parameters and leave their versions alone."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._seen)

    def _seen(self, *_: Any) -> None:
        self.count += 1


_updates = cache(_Updates)


class Siblings:
    """The layers of one parent that take inputs of the same width.

    Args:
        parent: their parent.
        names: of the layers in it, at least two.
        automatic: whether they are computed together only on a CUDA device under the triton backend, and only where
            that shares a pass over x.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], automatic: bool) -> None:
        self._parent = parent
        self._names = names
        self._automatic = automatic
        self._hooks: list[RemovableHandle] = []
        self._frames: dict[int, _Frame] = {}  # by thread
        self._reads: dict[_Turn, dict[str, int]] = {}  # 1: read the same x the last time; below: not, or not yet again
        self._learned: dict[_Turn, tuple[str, ...]] = {}
        self._settled: dict[_Turn, tuple[str, ...]] = {}
        self._settled_at: object = None
        self._applied: dict[_Turn, tuple[str, ...]] = {}
        self._paid: dict[_Asked, bool] = {}
        for name in names:
            parent._modules[name].__dict__["_siblings"] = self
        if not automatic:
            self._watch()

    def __getstate__(self) -> dict[str, Any]:
        """Copies share no forward that is under way."""
        return {**self.__dict__, "_frames": {}}

    def unlink(self) -> None:
        """The layers run alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in self._names:
            layer = self._parent._modules.get(name)
            if layer is not None and layer.__dict__.get("_siblings") is self:
                del layer.__dict__["_siblings"]

    def described(self, layer: nn.Module) -> tuple[str, Selection | None]:
        """With which siblings the layer is computed as one group, as far as their calls have shown, or why alone.

        Returns:
            That in words, and what the first such group runs on for ``NOMINAL_TOKENS``; None where the layer is alone.
        """
        name = next((name for name in self._names if self._parent._modules.get(name) is layer), None)
        if name is None:
            return "", None
        others = ", ".join(other for other in self._names if other != name)
        if not self._hooks:
            where = "on a CUDA device under triton, where that shares a pass over x"
            return f"alone; as one group with {others} {where}", None
        together, apart = self._groups_with(name)
        said = [", ".join(member for member in members if member != name) for members in together or apart]
        with_whom = " or with ".join(dict.fromkeys(said))
        if together:
            return f"as one group with {with_whom}", self._explained(together[0])
        if apart:
            selection = self._explained(apart[0])
            why = "shares no pass over x" if selection is None else f"shares no pass over x: {selection.reason}"
            if selection is not None and "stack" in selection.plan:
                why = "saves less of the device's time than of the host's it takes"
            return f"alone: a group with {with_whom} {why}", None
        return f"alone: no call showed yet that {others} read the same x", None

    def _groups_with(self, name: str) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Layers whose calls have shown that they read the same x: those computed together, and those not worth it."""
        together, apart = list[tuple[str, ...]](), list[tuple[str, ...]]()
        for turn, followers in self._learned.items():
            paid = [paid for asked, paid in self._paid.items() if asked[0] == turn]
            if name in (turn.name, *followers):
                (together if any(paid) or not paid else apart).append((turn.name, *followers))
        return together, apart

    def _explained(self, names: tuple[str, ...]) -> Selection | None:
        """What these layers run on in one call; None where they can't be in one."""
        layers = [layer for name in names if type(layer := self._parent._modules.get(name)) is FusedSVDLinear]
        weight = layers[0].base_layer.weight
        x = weight.new_empty(()).expand(NOMINAL_TOKENS, layers[0].in_features)
        calls = [call for layer in layers if (call := layer.group_call(x)) is not None]
        if len(calls) < len(names):
            return None
        _, dropout_p, backend, *_ = calls[0]
        return explain_group_call(x, [call.layer for call in calls], dropout_p=dropout_p, backend=backend)

    def output(self, layer: FusedSVDLinear, x: Tensor) -> Tensor | None:
        """The layer's output, alone or with its siblings'; None where it is to run alone."""
        if not self._hooks:
            if _runs_on_triton(layer, x):
                self._watch()
            return None
        frame = self._frames.get(get_ident())
        if frame is None or type(x) is not Tensor or x.is_inference():
            return None
        name = frame.name_of(layer, self._names)
        if name is None:
            return None
        turn, frame.before = _Turn(frame.before, name), name
        reading = frame.reading
        if reading is not None and reading.is_of(x):
            return self._follow(reading, name, layer)
        if reading is not None:
            self._note_unused(reading)
        frame.reading = reading = _Reading(x, turn)
        return self._lead(frame, reading, x, layer)

    def _lead(self, frame: _Frame, reading: _Reading, x: Tensor, layer: FusedSVDLinear) -> Tensor | None:
        followers = frame.followers.get(reading.turn)
        if not followers or (self._automatic and self._paid.get(_asked(reading.turn, followers, x)) is False):
            return None
        call = layer.group_call(x)
        if call is None:
            return None
        names, calls = [], [call]
        for name in followers:
            follower = frame.parent._modules.get(name)
            if type(follower) is not FusedSVDLinear or not _is_called_as_it_is(follower):
                continue
            other = follower.group_call(x)
            if other is not None and (other.dropout_p, other.backend) == (call.dropout_p, call.backend):
                names.append(name)
                calls.append(other)
        layers = [other.layer for other in calls]
        if not names or (self._automatic and not self._pays(_asked(reading.turn, tuple(names), x), x, layers, call)):
            return None
        first, *others = svd_linear_group(x, layers, dropout_p=call.dropout_p, backend=call.backend)
        reading.waiting.update(zip(names, zip(calls[1:], others, strict=True), strict=True))
        return first

    def _follow(self, reading: _Reading, name: str, layer: FusedSVDLinear) -> Tensor | None:
        if name == reading.turn.name:
            return None
        asked, output = reading.waiting.pop(name, (None, None))
        self._note(reading.turn, name, True)
        return output if asked is not None and layer.still_makes(asked) else None

    def _pays(self, asked: _Asked, x: Tensor, layers: list[GroupedLayer], call: GroupCall) -> bool:
        """As ``shares_passes``, asked once."""
        if asked not in self._paid:
            self._paid[asked] = shares_passes(x, layers, dropout_p=call.dropout_p, backend=call.backend)
        return self._paid[asked]

    def _note(self, turn: _Turn, name: str, read: bool) -> None:
        """Who was computed in vain must read the same x twice before it is computed ahead again."""
        reads = self._reads.setdefault(turn, {})
        balance = min(reads.get(name, 0) + 1, 1) if read else -1
        if reads.get(name) != balance:
            reads[name] = balance
            self._learned = {
                t: followers
                for t, of_turn in self._reads.items()
                if (followers := tuple(n for n, found in of_turn.items() if found > 0))
            }

    def _note_unused(self, reading: _Reading) -> None:
        for name in reading.waiting:
            self._note(reading.turn, name, False)

    def _watch(self) -> None:
        _updates()
        parent = self._parent
        self._hooks.append(parent.register_forward_pre_hook(self._begin))
        self._hooks.append(parent.register_forward_hook(self._end, always_call=True))

    def _begin(self, parent: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        first = parent._modules.get(self._names[0])
        if not isinstance(first, FusedSVDLinear):  # unloaded
            self.unlink()
            return
        if not _capturing():
            self._applied = self._learned
            if parent.training or torch.is_grad_enabled():
                # A step's updates write to the adapter, and no graph from before them can still be used.
                factors = first._modules["lora_A"]._parameters
                versions = [(id(f), f._version) for f in factors.values() if f is not None and not f.is_inference()]
                now = (_updates().count, versions)
                if now != self._settled_at:
                    self._settled, self._settled_at = self._learned, now
                self._applied = self._settled
        self._frames[get_ident()] = _Frame(parent, self._applied)

    def _end(self, parent: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        frame = self._frames.pop(get_ident(), None)
        # Without an output the forward was broken off, as a recomputation is that has all it needs.
        if frame is not None and frame.reading is not None and output is not None:
            self._note_unused(frame.reading)


def _runs_on_triton(layer: FusedSVDLinear, x: Tensor) -> bool:
    """Whether the layer's call for x goes to the triton backend on a CUDA device."""
    call = layer.group_call(x) if x.is_cuda else None
    if call is None:
        return False
    rank = call.layer.lora_A.shape[0]
    selection = select("svd_linear", x.device.type, compute_dtype_of(x), rank, call.backend)
    return selection.backend is Backend.TRITON


def _capturing() -> bool:
    """Whether a CUDA graph is being captured. Where CUDA has not begun, there may be no such question."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_called_as_it_is(layer: nn.Module) -> bool:
    """Whether nothing comes between a call of the layer and its forward that might change its input or itself."""
    hooked = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return "forward" not in layer.__dict__ and not hooked


def link_siblings(model: nn.Module, siblings: bool | None) -> None:
    """Let the fused layers of ``model`` that may read the same tensor find each other; ``siblings`` as in patch_model.

    Candidates are the children of one module that take inputs of the same width.
    """
    parents = list(model.modules())
    for layer in parents:
        if (linked := layer.__dict__.get("_siblings")) is not None:
            linked.unlink()
    if siblings is False:
        return
    for parent in parents:
        by_width: dict[int, list[str]] = {}
        for name, child in parent._modules.items():
            if type(child) is FusedSVDLinear:
                by_width.setdefault(child.in_features, []).append(name)
        for names in by_width.values():
            if len(names) > 1:
                Siblings(parent, tuple(names), automatic=siblings is None)


__all__ = ["Siblings", "link_siblings"]
