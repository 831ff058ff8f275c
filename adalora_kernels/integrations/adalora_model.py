"""PEFT's AdaLoRA model with its orthogonality term and its rank allocation done for all layers at once.

The term is PEFT's, γ · mean ‖·‖_F over all matrices, added to ``outputs.loss``; but in training only, whatever the task
type, and once per optimizer step. The schedule is PEFT's, and so is the format of ``config.rank_pattern``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.adalora.config import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adalora_kernels.allocator import find_triplets
from adalora_kernels.allocator.compact import is_laid_out
from adalora_kernels.allocator.orthogonality import loss_of_devices
from adalora_kernels.allocator.triplets import Lookup
from adalora_kernels.allocator.watch import unwatch, watch
from adalora_kernels.backends.select import Backend, offers, parse
from adalora_kernels.integrations.exchange import fuse_layer
from adalora_kernels.integrations.load_adapter import follow_load_adapter
from adalora_kernels.integrations.rank_pattern import Pattern, by_layer, gather, path_key, return_averages
from adalora_kernels.integrations.siblings import link_siblings
from adalora_kernels.integrations.tuner_allocator import TunerAllocator
from adalora_kernels.ops.shards import are_gathered, are_sharded


@dataclass
class FusedState:
    """What a fused model holds beyond PEFT's attributes.

    Attributes:
        backend, siblings: as given to ``patch_model``.
        hook: adds the orthogonality term where PEFT's forward is bypassed.
        layers: the AdaLoRA layers by path; None where they must be looked up.
        factors: where A and B of adapter ``factors_of`` are kept; None where they must be looked up.
        factors_of: the adapter that was last trained.
        allocator: None before the first step.
        bound: whether the allocator was made for the layers as they are now.
        kept: for each adapter and layer that was loaded without its dead rows, which rows were loaded.
        term_due: whether an optimizer step was made since the term was last added.
        term_used: whether the term was ever asked for.
        term_missed: whether a training forward returned no loss that could hold it.
    """

    backend: str | Backend | None = None
    siblings: bool | None = None
    hook: RemovableHandle | None = None
    layers: dict[str, AdaLoraLayer] | None = None
    factors: tuple[Lookup, Lookup] | None = None
    factors_of: str = ""
    allocator: TunerAllocator | None = None
    bound: bool = False
    kept: dict[str, Pattern] = field(default_factory=dict)
    term_due: bool = True
    term_used: bool = False
    term_missed: bool = False


class FusedAdaLoraModel(AdaLoraModel):
    """What ``patch_model`` exchanges PEFT's ``AdaLoraModel`` for.

    Attributes:
        last_orthogonality: the orthogonality term as last computed, weight included, detached; None before that.
    """

    last_orthogonality: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that was pickled patched may come into a process where nothing is patched yet."""
        super().__setstate__(state)
        follow_load_adapter()

    @property
    def fused_state(self) -> FusedState:
        """What this model holds beyond PEFT's attributes."""
        state: FusedState | None = self.__dict__.get("_fused_state")
        if state is None:  # torch.compile of torch 2.11 can't trace setdefault
            state = self._fused_state = FusedState()
        return state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, with the orthogonality term in training only."""
        return self._with_orthogonality(self.model.forward(*args, **kwargs), kwargs)

    def add_term(self, module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Forward hook of the inner model, which PEFT calls directly where the config has no task type."""
        return self._with_orthogonality(outputs, kwargs)

    def orthogonality_loss(self) -> Tensor:
        """The trained adapter's orthogonality term: 0-d, differentiable, weight included; 0 where no adapter trains.

        In training, a loss that the model returns holds it already. Add it to a loss that is computed elsewhere.
        """
        state = self.fused_state
        state.term_used = True
        trained = self.trained_adapter()
        name, weight = ("", 0.0) if trained is None else (trained[0], trained[1].orth_reg_weight)
        lora_A, lora_B = self._factors(name)
        if weight == 0 or not lora_A:
            return torch.zeros(())
        backend = self.backend_of("orthogonality")
        at_once = False if are_gathered(self.adalora_layers().values()) else None
        total = loss_of_devices(lora_A, lora_B, weight, accumulate=at_once, backend=backend)
        self.last_orthogonality = total.detach()
        return total

    def _with_orthogonality(self, outputs: Any, kwargs: dict[str, Any]) -> Any:
        if not self.training or self.trained_adapter() is None:
            return outputs
        named = hasattr(outputs, "loss")
        loss = outputs.loss if named else outputs.get("loss") if isinstance(outputs, dict) else None
        if not isinstance(loss, Tensor):
            if torch.is_grad_enabled():  # written, not read: a compiler would guard it and compile again
                self.fused_state.term_missed = True
            return outputs
        # With a token count, transformers' Trainer takes this loss as a share of the step's and doesn't divide it.
        if kwargs.get("num_items_in_batch") is not None and not self._starts_a_step():
            return outputs
        if torch.is_grad_enabled():
            self.fused_state.term_due = False
        loss = loss + self.orthogonality_loss().to(device=loss.device, dtype=loss.dtype)
        if isinstance(outputs, tuple):
            return outputs._replace(loss=loss)  # type: ignore[attr-defined]
        if named:
            outputs.loss = loss
            return outputs
        outputs = copy(outputs)
        outputs["loss"] = loss
        return outputs

    def _starts_a_step(self) -> bool:
        """Whether no gradient was accumulated since the last optimizer step, as far as can be seen from here."""
        if self.fused_state.term_due:
            return True
        trained = self.trained_adapter()
        lora_A, _ = self._factors("" if trained is None else trained[0])
        if any(a.grad is not None for a in lora_A):
            return False
        # Engines take gradients away as soon as they are there.
        return not (any(map(is_laid_out, lora_A)) or are_gathered(self.adalora_layers().values()))

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's entry point: call it after ``optimizer.step()`` and before ``zero_grad()``.

        While global_step < total_step - tfinal the gradients go into the importance averages. A step with a gradient
        that is not finite leaves averages and pattern as they are, a parameter without a gradient keeps its averages,
        and a target rank at or above the initial one prunes nothing. The schedule is read from the config at each step.
        After ``rank_allocator().attach(optimizer)`` the optimizer's steps do all of this.
        ``config.rank_pattern`` changes where this step ranked; that read-back waits for the device.

        Args:
            global_step: the optimizer step that was just made, counted from 0.

        Raises:
            ValueError: no adapter trains; or no parameter has a gradient although one is needed, that is, ``backward``
                was not called or the gradients are already cleared. Model and allocator are left as they were.
        """
        if self.trained_adapter() is None:
            raise ValueError("update_and_allocate: expected a trainable AdaLoRA adapter, found only inference adapters")
        allocator = self.rank_allocator()
        allocator.update_and_mask(allocator.model, global_step)

    def rank_allocator(self) -> TunerAllocator:
        """The allocator of the trained adapter, on the schedule that its config holds now.

        Raises:
            ValueError: no adapter trains, or its rank pattern doesn't fit its layers.
        """
        trained = self.trained_adapter()
        if trained is None:
            raise ValueError("model: expected a trainable AdaLoRA adapter, found only inference adapters")
        name, config = trained
        state = self.fused_state
        allocator = state.allocator
        if allocator is None or allocator.adapter != name or not self._rebind(allocator):
            allocator = state.allocator = TunerAllocator(self, name, config)
        state.bound, allocator.config = True, config
        allocator.follow_config()
        return allocator

    def _rebind(self, allocator: TunerAllocator) -> bool:
        """Let the allocator follow parameters that were replaced or moved; False where it no longer fits them."""
        if self.fused_state.bound and allocator.importance.lies_beside(allocator.parameters()[1::3]):
            return True
        shapes = [triplet.shape for triplet in find_triplets(self.model, allocator.adapter)]
        if shapes != list(allocator.importance.layout.shapes):
            return False
        allocator.bind(self.model)
        return True

    def trained_adapter(self) -> tuple[str, AdaLoraConfig] | None:
        """Name and config of the adapter that trains, or None if all are for inference."""
        for name in (self.__dict__.get("trainable_adapter_name"), *self.peft_config):
            config = self.peft_config.get(name)
            if config is not None and not config.inference_mode:
                return name, config
        return None

    def adalora_layers(self) -> dict[str, AdaLoraLayer]:
        """The AdaLoRA layers of every kind, by their paths in the inner model."""
        state = self.fused_state
        if state.layers is None:
            state.layers = {path: m for path, m in self.model.named_modules() if isinstance(m, AdaLoraLayer)}
        return state.layers

    def _factors(self, adapter: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """A and B of each layer that has the trained adapter, as they are now."""
        state = self.fused_state
        if state.factors is None or state.factors_of != adapter:
            triplets = find_triplets(self.model, adapter) if adapter else []
            state.factors = Lookup([t.slots[0] for t in triplets]), Lookup([t.slots[2] for t in triplets])
            state.factors_of = adapter
        lora_A, lora_B = state.factors
        return lora_A(), lora_B()

    def backend_of(self, op: str) -> Backend | None:
        """The backend asked for, where it has ``op``; else the automatic choice."""
        backend = parse(self.fused_state.backend)
        return backend if backend is not None and offers(backend, op) else None

    def _changed(self) -> None:
        self.fused_state.layers = self.fused_state.factors = None
        self.fused_state.bound = False

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the layers that it adds are fused as well, and linked to their siblings."""
        before = set(self.adalora_layers().values())
        super().inject_adapter(*args, **kwargs)
        self._changed()
        if added := set(self.adalora_layers().values()) - before:
            for layer in added:
                fuse_layer(layer, self.fused_state.backend)
            link_siblings(self.model, self.fused_state.siblings)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        self._changed()
        state = self.fused_state
        state.kept.pop(adapter_name, None)
        if state.allocator is not None and state.allocator.adapter == adapter_name:
            state.allocator = None  # another adapter of this name is none of its business

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._changed()
        if self.fused_state.hook is not None:
            self.fused_state.hook.remove()
        return model

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """As PEFT's, with the layer found by its exact name and its dtype and factor c unchanged.

        Sharded layers stay whole, since so do the checkpoints that FSDP2 makes of them by itself.
        """
        layers = self.adalora_layers()
        pattern = by_layer(rank_pattern, layers, adapter_name)
        if are_sharded([layers[path].lora_E[adapter_name] for path in pattern]):
            return
        before = {}
        for path, row in pattern.items():
            layer = layers[path]
            rows = layer.lora_E[adapter_name].shape[0]
            if len(row) != rows:
                raise ValueError(f"rank_pattern[{path!r}]: expected {rows} entries, one for each row, got {len(row)}")
            before[path] = (layer.lora_E[adapter_name].dtype, layer.scaling[adapter_name], layer.ranknum[adapter_name])
        super().resize_modules_by_rank_pattern(
            {path_key(p, adapter_name): row for p, row in pattern.items()}, adapter_name
        )
        for path, (dtype, scaling, ranknum) in before.items():
            layer = layers[path]
            layer.scaling[adapter_name] = scaling
            with torch.no_grad():
                layer.ranknum[adapter_name].copy_(ranknum)
            for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
                factors[adapter_name].data = factors[adapter_name].data.to(dtype)
            if not all(pattern[path]):
                self.fused_state.kept.setdefault(adapter_name, {})[path] = pattern[path]
        self._changed()

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict[str, Any], state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """As PEFT's, with the layer found by its exact name, also where only its live rows were loaded.

        Shards stay what they are: accelerate asks for them where FSDP2's own checkpoint is to hold the parameters.
        """
        pattern = by_layer(rank_pattern, self.adalora_layers(), adapter_name)
        # PEFT has just put its own spelling there, which is broken where a path contains the adapter's name.
        self.peft_config[adapter_name].rank_pattern = {f"{path}.lora_E": row for path, row in pattern.items()}
        if are_sharded(state_dict.values()):
            return state_dict
        kept = self.fused_state.kept.get(adapter_name, {})
        present = {path_key(path, adapter_name): gather(row, kept.get(path)) for path, row in pattern.items()}
        resized: dict[str, Tensor] = super().resize_state_dict_by_rank_pattern(present, state_dict, adapter_name)
        return resized


def fuse_model(model: AdaLoraModel, backend: str | Backend | None, siblings: bool | None) -> None:
    """Exchange the class of one AdaLoRA model in place."""
    if type(model) is not FusedAdaLoraModel:
        model.__class__ = FusedAdaLoraModel
        follow_load_adapter()
        model.fused_state.hook = model.model.register_forward_hook(model.add_term, with_kwargs=True)
        if triplets := find_triplets(model.model):
            watch(model, triplets[0].slots[1], "patch_model was called", "base_model.update_and_allocate(step)")
    state = model.fused_state
    state.backend, state.siblings = backend, siblings
    if state.allocator is not None:
        state.allocator.backend = model.backend_of("importance")
    if (trained := model.trained_adapter()) is not None:
        # Looked up here, or a compiler would guard that they weren't, and compile the second step again.
        model.adalora_layers(), model._factors(trained[0])


def restore_model(model: FusedAdaLoraModel) -> None:
    """Undo ``fuse_model``; PEFT's allocator continues with our averages."""
    state = model.fused_state
    unwatch(model)
    if state.hook is not None:
        state.hook.remove()
    peft_allocator = model.__dict__.get("rankallocator")
    if state.allocator is not None and peft_allocator is not None:
        return_averages(state.allocator, peft_allocator)
    for attribute in ("_fused_state", "last_orthogonality"):
        model.__dict__.pop(attribute, None)
    model.__class__ = AdaLoraModel


__all__ = ["FusedAdaLoraModel", "FusedState", "fuse_model", "restore_model"]
