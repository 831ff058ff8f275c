"""The arguments of a watched call's launches without its tensors: pointers as places in what was given or made.

What is known of a call outlives it, and must not keep what it was given or made, graph and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 256  # bytes, of what shares a buffer; the caching allocator's is 512


class Pointer(NamedTuple):
    """``beyond`` bytes past the ``number``-th of a call's addresses."""

    number: int
    beyond: int

    def among(self, addresses: Sequence[int]) -> int:
        return addresses[self.number] + self.beyond


class Descriptor:
    """A tensor descriptor as a compiled kernel's launcher reads it: all of ``like`` but its tensor, at ``address``."""

    address: int

    def __init__(self, like: TensorDescriptor | Descriptor, address: int) -> None:
        vars(self).update(vars(like), address=address)
        vars(self).pop("base", None)

    @property
    def base(self) -> Descriptor:
        """What has the address: not an attribute, or each would be a cycle."""
        return self

    def data_ptr(self) -> int:
        return self.address


class Described(NamedTuple):
    """A tensor descriptor of what a pointer points to; the descriptor's own address is of no account."""

    descriptor: Descriptor
    pointer: Pointer


class UnknownOriginError(Exception):
    """A tensor was neither given nor made."""


class Places:
    """The addresses of a call, and what lies there: what is given, each result, one buffer for all else that is made
    (the scratch), and the workspace, where there are such.

    Attributes:
        scratch: bytes that the scratch needs.
        count: of the addresses.
    """

    def __init__(
        self,
        given: Sequence[Tensor | None],
        results: Sequence[Tensor],
        others: Sequence[Tensor],
        workspaces: Sequence[Tensor],
    ) -> None:
        self.scratch = 0
        self.count = len(given) + len(results)
        self._exact = {t.data_ptr(): Pointer(i, 0) for i, t in enumerate(given) if t is not None}
        self._made = [(t, Pointer(len(given) + i, 0)) for i, t in enumerate(results)]
        for t in others:
            self._made.append((t, Pointer(self.count, self.scratch)))
            self.scratch += -(-t.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        self.count += self.scratch > 0
        self._exact |= {buffer.data_ptr(): Pointer(self.count, 0) for buffer in workspaces}
        self.count += bool(workspaces)

    def term(self, argument: Any) -> Any:
        """A launch's argument, without the tensor in it: a Pointer, Described, or what it was; 0 is the null pointer.

        Raises:
            UnknownOriginError: it is none of the call's tensors.
        """
        if isinstance(argument, Tensor):
            return self._pointer(argument)
        if isinstance(argument, TensorDescriptor):
            return Described(Descriptor(argument, 0), self._pointer(argument.base))
        return argument

    def _pointer(self, tensor: Tensor) -> Any:
        address = tensor.data_ptr()
        if address == 0:
            return 0
        for t, (number, beyond) in self._made:
            if holds(t, address):
                return Pointer(number, beyond + address - t.data_ptr())
        if address not in self._exact:
            raise UnknownOriginError
        return self._exact[address]


def holds(tensor: Tensor, address: int) -> bool:
    """Whether an address lies in a tensor's memory; nothing but its own begins at that of an empty one."""
    return 0 <= address - tensor.data_ptr() < max(1, tensor.untyped_storage().nbytes())


__all__ = ["Described", "Descriptor", "Places", "Pointer", "UnknownOriginError", "holds"]
