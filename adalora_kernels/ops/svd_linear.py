"""``svd_linear``: the AdaLoRA layer as one differentiable call, in eager mode and under ``torch.compile``.

One derivation of the gradient serves both ways in. Eager calls go through ``_SVDLinear``, an autograd Function that
calls the launcher directly (8 µs of host time; through the dispatcher it would be 23). Compiled calls go through
``adalora::svd_linear_forward`` and ``adalora::svd_linear_backward``, which share the Function's ``setup_context`` and
``backward``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends import rows
from adalora_kernels.backends.select import Backend, Selection, implementation, parse, select
from adalora_kernels.ops.checks import as_float, check_layer
from adalora_kernels.ops.importance import LayerImportance, begin_layer, sink_of
from adalora_kernels.ops.once import differentiable_once
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear import forward as expression

SEED_RANGE = 2**63 - 1
_NOTHING = nullcontext()


def svd_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | Backend | None = None,
) -> Tensor:
    """y = x Wᵀ + b + (drop(x) Aᵀ ⊙ c E ⊙ mask) Bᵀ (AdaLoRA, arXiv 2303.10512, equation 3).

    The products run in the autocast dtype where autocast is on, else in x's dtype; weight and adapter are read in it,
    whatever their own dtype. Saved for the backward: x itself, x Aᵀ [M, R] and the parameters.

    Args:
        x: [..., K], any leading shape and strides.
        weight: W [N, K], any strides (pass ``weight.t()`` where it is stored [K, N]).
        lora_A: Q [R, K].
        lora_E: Λ [R, 1] or [R].
        lora_B: P [N, R].
        bias: [N] or None.
        mask: [R] or [R, 1], multiplies Λ in the forward and its gradient; None lets Λ alone decide. Not differentiated.
        scaling: c, the whole factor of the increment, that is alpha / (ranknum + 1e-5).
        dropout_p: probability of dropping an element of x before A, in [0, 1].
        training: whether dropout applies.
        backend: "reference", "native", "triton", or None for the best that can run. "triton:one_pass/split" also names
            the plans of forward and backward; either may be left out.

    Returns:
        y [..., N] in the dtype of the products.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or probability does not fit; the message names the argument.
        RuntimeError: the backend or plan asked for can't run; nor does any but the reference under torch.func.
    """
    if weight is None:
        raise TypeError("weight: expected a tensor, got NoneType; svd_linear_into takes a base's output instead")
    return _call(x, weight, bias, None, lora_A, lora_E, lora_B, mask, scaling, dropout_p if training else 0.0, backend)


def svd_linear_into(
    base_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | Backend | None = None,
) -> Tensor:
    """Add the increment into the output of a base that is not a plain weight (quantised, or any module).

    In eager mode the sum is made in the memory of ``base_output``, which must not be used afterwards; a base that
    hands back x itself, or something that shares x's memory, is copied first. Arguments and errors as in
    ``svd_linear``.

    Args:
        base_output: [..., N], what the base answered for x.

    Returns:
        base_output + (drop(x) Aᵀ ⊙ c E ⊙ mask) Bᵀ, [..., N] in the dtype of ``base_output``.
    """
    return _call(
        x, None, None, base_output, lora_A, lora_E, lora_B, mask, scaling, dropout_p if training else 0.0, backend
    )


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on and applies, else x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str | Backend | None,
) -> Tensor:
    check_layer(x, weight, bias, base, lora_A, lora_E, lora_B, mask, dropout_p)
    dtype = compute_dtype_of(x)
    seed = None
    if dropout_p > 0 and lora_A.shape[0] > 0:
        # A tensor, so that no host sync is needed, a CUDA graph can replay it, and checkpointing regenerates it.
        seed = torch.randint(SEED_RANGE, (1,), dtype=torch.int64, device=x.device)
    adapter = Adapter(lora_A, lora_E, lora_B, mask, seed, as_float("scaling", scaling), dropout_p, dtype)
    if torch.compiler.is_compiling():
        # Names only: the op chooses when it runs, where the compiler doesn't trace.
        name = backend.value if isinstance(backend, Backend) else backend or "auto"
        y, _ = torch.ops.adalora.svd_linear_forward(x, weight, bias, base, *adapter, name)
    elif torch._C._are_functorch_transforms_active():
        y = _as_expression(x, weight, bias, base, adapter, backend)
    else:
        selection = select("svd_linear", x.device.type, dtype, lora_A.shape[0], backend)
        y = _apply(x, weight, bias, base, *adapter, selection)
    return y


def _as_expression(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    backend: str | Backend | None,
) -> Tensor:
    """The reference's expression, which torch.func can transform (grad, vmap, jvp); a Function of ours it can't."""
    if parse(backend) not in (None, Backend.REFERENCE):
        raise RuntimeError(f"backend: expected None or 'reference' under torch.func's transforms, got {backend!r}")
    tokens, n = rows.tokens_of(x), adapter.lora_B.shape[0]
    base_2d = None if base is None else base.reshape(tokens, n).clone()
    with autocast_off(x):
        y, _ = expression(x.reshape(tokens, x.shape[-1]), weight, bias, base_2d, adapter)
    return y.reshape(*x.shape[:-1], n)


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Launchers cast by themselves. Entered only where autocast is on: even to turn off what is off takes 5 µs."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else _NOTHING


@cache
def launchers(selection: Selection) -> tuple[Any, Any]:
    """Forward and backward of a backend for x of any leading shape, the plan that was asked for among the arguments."""
    module = implementation("svd_linear", selection.backend)
    if selection.backend is Backend.TRITON:
        forward, backward = module.svd_linear_forward, module.svd_linear_backward
        plan = selection.plan_asked_for
        return (partial(forward, plan=plan), partial(backward, plan=plan)) if plan else (forward, backward)
    reference = selection.backend is Backend.REFERENCE
    forward, backward = (
        (module.forward, module.backward) if reference else (module.svd_linear_forward, module.svd_linear_backward)
    )
    return partial(rows.forward, forward), partial(rows.backward, backward)


def _u_columns(rank: int, selection: Selection) -> int:
    """Width of u: R, padded to what the backend's matrix instructions need."""
    if selection.backend is Backend.TRITON:
        from adalora_kernels.backends.triton import rank_padding

        return rank_padding(rank)
    return rank


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    selection: Selection,
) -> tuple[Tensor, Tensor]:
    """Launch; ``base`` is added to in place."""
    launch, _ = launchers(selection)
    with autocast_off(x):
        y, u = launch(x, weight, bias, base, adapter)
    # What a Function returns must be neither its argument nor a view.
    return y if base is None else torch.ops.aten._unsafe_view.default(y, base.shape), u


def _backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter,
    needs: list[bool],
    selection: Selection,
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, A, E, B, each None where ``needs`` doesn't ask for it.

    ``importance``: to be updated where the last three are finished, on a backend that does.
    """
    need_x, need_weight, need_bias, *need_adapter = needs
    _, launch = launchers(selection)
    dw = db = None
    with autocast_off(x):
        extra = {} if importance is None else {"importance": importance}
        dx, dA, dE, dB = launch(grad_y, x, u, weight, adapter, (need_x, *need_adapter), **extra)
        if need_weight and weight is not None:
            g, x_2d = rows.flat(grad_y).to(adapter.compute_dtype), rows.flat(x).to(adapter.compute_dtype)
            dw = (g.t() @ x_2d).to(weight.dtype)
        if need_bias and bias is not None:
            db = rows.flat(grad_y).sum(0).to(bias.dtype)
    return dx, dw, db, dA, dE, dB


class _SVDLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, base, *branch, selection = args
        if base is not None:
            # An alias that autograd doesn't follow: added to directly, a view would be copied five times. It shares
            # the version counter, so a base that saved its output for its own backward is still told.
            base = _addable(base, x)
        y, u = _forward(x, weight, bias, base, Adapter._make(branch), selection)
        _save(ctx, args, u)
        ctx.lora_A = args[4]  # itself: under checkpointing the saved one is an alias
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_y, _backward)


# Past Function.apply, which at each call inspects signatures and looks at every argument for what transforms of
# torch.func may have left: those never come here.
_apply = super(torch.autograd.Function, _SVDLinear).apply


def _save(ctx: Any, inputs: tuple[Any, ...], u: Tensor) -> None:
    x, weight, bias, _, lora_A, lora_E, lora_B, mask, seed, *rest = inputs
    ctx.save_for_backward(x, u, weight, bias, lora_A, lora_E, lora_B, mask, seed)
    ctx.arguments = rest
    ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_y: Tensor | None, run: Any) -> tuple[Tensor | None, ...]:
    """The gradient of each forward argument; ``run`` is ``_backward``, or the op that holds it and selects anew."""
    if grad_y is None:
        return (None,) * 13
    x, u, weight, bias, *tensors = ctx.saved_tensors
    *numbers, chosen = ctx.arguments
    need = ctx.needs_input_grad
    needs = [need[i] for i in (0, 1, 2, 4, 5, 6)]
    arguments = [grad_y, x, u, weight, bias, Adapter(*tensors, *numbers), needs, chosen]
    begun = None
    if run is _backward:  # what is traced is left to the launch before the optimizer's step
        begun = begin_layer(ctx.lora_A, chosen.backend, needs[3:])
        arguments.append(begun)
    dx, dw, db, dA, dE, dB = run(*arguments)
    if run is _backward and dA is not None and dE is not None and dB is not None:
        sink = sink_of(ctx.lora_A)
        if sink is not None:
            sink.take_layer(ctx.lora_A, dA, dE, dB, begun)
    base_grad = grad_y if need[3] else None
    return (dx, dw, db, base_grad, dA, dE, dB, None, None, None, None, None, None)


def _addable(base: Tensor, x: Tensor) -> Tensor:
    """An alias of ``base`` that may be added to in place, or a copy where that would change something else."""
    shares_x = base.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    is_leaf_parameter = base.requires_grad and base.is_leaf
    alias = base.detach()
    if shares_x or is_leaf_parameter or not alias.is_contiguous():
        return alias.clone(memory_format=torch.contiguous_format)
    return alias


# The registered twin, for torch.compile: functional, so that ``base`` is copied (the compiler fuses the copy away).

_LIBRARY = torch.library.Library("adalora", "FRAGMENT")
_LAYER = (
    "Tensor lora_A, Tensor lora_E, Tensor lora_B, Tensor? mask, Tensor? seed, float scaling, float dropout_p, "
    "ScalarType compute_dtype"
)
_LIBRARY.define(
    f"svd_linear_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, {_LAYER}, str backend)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"svd_linear_backward(Tensor grad_y, Tensor x, Tensor u, Tensor? weight, Tensor? bias, {_LAYER}, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _resolve(x: Tensor, adapter: Adapter, backend: str) -> Selection:
    # int(): a rank is a constant of its layer, and the choice may depend on it.
    return select("svd_linear", x.device.type, adapter.compute_dtype, int(adapter.lora_A.shape[0]), backend)


def _forward_op(x: Tensor, weight: Any, bias: Any, base: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, backend = Adapter(*rest[:-1]), rest[-1]
    base = None if base is None else base.clone(memory_format=torch.contiguous_format)
    return _forward(x, weight, bias, base, adapter, _resolve(x, adapter, backend))


def _forward_fake(x: Tensor, weight: Any, bias: Any, base: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, backend = Adapter(*rest[:-1]), rest[-1]
    dtype, rank = adapter.compute_dtype, adapter.lora_A.shape[0]
    y = x.new_empty((*x.shape[:-1], adapter.lora_B.shape[0]), dtype=dtype if base is None else base.dtype)
    columns = _u_columns(rank, _resolve(x, adapter, backend))
    return y, x.new_empty((rows.tokens_of(x), columns), dtype=dtype)


def _backward_op(grad_y: Tensor, x: Tensor, u: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    """A schema can't return an optional tensor: what was not asked for is an empty one."""
    adapter, needs, backend = Adapter(*rest[:-2]), *rest[-2:]
    grads = _backward(grad_y, x, u, weight, bias, adapter, needs, _resolve(x, adapter, backend))
    return tuple(grad_y.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _backward_fake(grad_y: Tensor, x: Tensor, u: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    adapter, needs = Adapter(*rest[:-2]), rest[-2]
    owners = (x, weight, bias, adapter.lora_A, adapter.lora_E, adapter.lora_B)
    return tuple(
        owner.new_empty(owner.shape) if need and owner is not None else grad_y.new_empty(0)
        for owner, need in zip(owners, needs, strict=True)
    )


def _backward_registered(*args: Any) -> tuple[Tensor | None, ...]:
    *tensors, adapter, needs, backend = args
    grads = torch.ops.adalora.svd_linear_backward(*tensors, *adapter, needs, backend)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_LIBRARY.impl("svd_linear_forward", _forward_op, "CompositeExplicitAutograd")
_LIBRARY.impl("svd_linear_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("adalora::svd_linear_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("adalora::svd_linear_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "adalora::svd_linear_forward",
    lambda ctx, grad_y, grad_u: _gradients(ctx, grad_y, _backward_registered),
    setup_context=_setup_context,
    lib=_LIBRARY,
)


__all__ = ["SEED_RANGE", "autocast_off", "compute_dtype_of", "launchers", "svd_linear", "svd_linear_into"]
