"""Compiled kernels, kept and launched directly.

Triton's front binds, specialises and formats every argument and option anew at each launch, for 10 to 20 µs of host
time. Here a launch costs a look-up and a call of the compiled kernel's own launcher. The key of the look-up is at least
as fine as the front's: options, device, and for each argument its type and what the front specialises on,

* a tensor: dtype and alignment;
* an integer: its width, whether it is 1 and its low four bits (its width alone under ``do_not_specialize``);
* a tensor descriptor: dtype and block.

What is not yet kept goes through the front once. Knobs that change what is compiled therefore bind at the first launch;
launch hooks are read at every one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_BEYOND_31_BITS = -(1 << 31)
_ALIGNMENT = 15


class Kept(NamedTuple):
    """A compiled kernel with what its launcher takes besides the arguments; ``constants`` follow them."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class Launched(NamedTuple):
    """A launch that was made; ``kept`` is None where the front left nothing to keep."""

    kept: Kept | None
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class _Shape(NamedTuple):
    """Launches of one kernel with one set of options and types of arguments."""

    specialise: Callable[..., tuple[Any, ...]]
    kept: dict[tuple[Any, ...], Kept]
    kernel: JITFunction  # holds the identity that is part of the key


_shapes: dict[tuple[Any, ...], _Shape] = {}
_notes = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """As ``kernel[grid](*args, **options)``, on the device of the first tensor and that device's current stream.

    Args:
        kernel: a ``triton.jit`` function whose constexpr parameters come last.
        grid: one to three extents.
        args: every argument that is not constexpr: tensors, tensor descriptors, numbers or None, by position.
        options: every constexpr and launch option, by name, in the same order at each call.

    Raises:
        TypeError: an argument is of another type, none is a tensor, or the count is not the kernel's.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*args, **options)
        return
    types = (id(kernel), *map(type, args), *options, *options.values())
    shape = _shapes.get(types)
    if shape is None:
        shape = _shapes[types] = _Shape(_specialiser(kernel, args), {}, kernel)
    key = shape.specialise(*args)
    kept = shape.kept.get(key)
    if kept is None:
        kept = _launch_and_keep(shape, key, grid, args, options)
        _note(kept, grid, args)
        return
    device = key[0]
    active = driver.active
    if device != active.get_current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **options)
        return
    stream = active.get_current_stream(device)
    enter = leave = about = None
    if hooked():
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        about = kept.kernel.launch_metadata(grid, stream, *args, *kept.constants)
    x, y, z = (*grid, 1, 1)[:3]
    kept.run(x, y, z, stream, kept.function, kept.metadata, about, enter, leave, *args, *kept.constants)
    _note(kept, grid, args)


def hooked() -> bool:
    """Whether anybody wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def noted(launches: list[Launched]) -> Iterator[None]:
    """Within, this thread's launches are appended to ``launches``."""
    before, _notes.launches = getattr(_notes, "launches", None), launches
    try:
        yield
    finally:
        _notes.launches = before


def _note(kept: Kept | None, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    launches = getattr(_notes, "launches", None)
    if launches is not None:
        launches.append(Launched(kept, grid, args))


def kept_kernels() -> list[CompiledKernel]:
    """All that is kept, once each."""
    kept = {id(entry.kernel): entry.kernel for shape in _shapes.values() for entry in shape.kept.values()}
    return list(kept.values())


def _launch_and_keep(
    shape: _Shape, key: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Kept | None:
    """Launch through the front, which compiles what it has to, and keep what it launched."""
    with torch.cuda.device(key[0]):
        compiled = shape.kernel[grid](*args, **options)
    # A hook that took over the compilation may have left nothing, or a promise.
    if isinstance(compiled, CompiledKernel):
        constants = tuple(options.get(p.name, p.default) for p in shape.kernel.params[len(args) :])
        metadata = compiled.packed_metadata
        shape.kept[key] = Kept(compiled, compiled.run, compiled.function, metadata, constants)
    return shape.kept.get(key)


def _specialiser(kernel: JITFunction, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """A function of arguments of these types: the device, and all that tells two compiled kernels apart.

    Written out as source, as the front's own binder is, so that nothing is decided per argument when it runs.
    """
    parameters = kernel.params
    name = kernel.__name__
    if [p.is_constexpr for p in parameters] != [False] * len(args) + [True] * (len(parameters) - len(args)):
        expected = sum(not p.is_constexpr for p in parameters)
        raise TypeError(f"{name}: expected {expected} arguments, constexprs after them and by name; got {len(args)}")
    device, terms = None, []
    for parameter, value in zip(parameters, args, strict=False):
        p, free = parameter.name, parameter.do_not_specialize
        if hasattr(value, "data_ptr"):
            terms.append(f"{p}.dtype" if free else f"{p}.dtype, {p}.data_ptr() & {_ALIGNMENT}")
            device = device or f"{p}.get_device()"
        elif isinstance(value, TensorDescriptor):
            terms.append(f"{p}.base.dtype, tuple({p}.block_shape)")
            device = device or f"{p}.base.get_device()"
        elif isinstance(value, int) and not isinstance(value, bool):
            width = f"{p} & {_BEYOND_31_BITS}"
            terms.append(width if free else f"-1 if {p} == 1 else {p} & {_BEYOND_31_BITS | _ALIGNMENT}")
        elif not (value is None or isinstance(value, bool | float)):
            raise TypeError(f"{name}: {p}: expected a tensor, tensor descriptor, number or None, got {type(value)}")
    if device is None:
        raise TypeError(f"{name}: expected a tensor among its arguments")
    names = ", ".join(p.name for p in parameters[: len(args)])
    specialise: Callable[..., tuple[Any, ...]] = eval(f"lambda {names}: ({', '.join([device, *terms])},)")
    return specialise


__all__ = ["Kept", "Launched", "hooked", "kept_kernels", "launch", "noted"]
