"""Where each rank's parts of sharded matrices lie, and whole matrices made of them in one collective.

A matrix that is a DTensor (FSDP2, tensor parallelism) or that lies flat over the ranks (ZeRO) is on each rank some
rectangles. Whole matrices are a sum over the ranks: each puts its rectangles into zeros. That is twice the bytes of a
gather, but one collective for matrices of any sharding, and exact, since every element has one owner.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_kernels.ops.checks import floating_state_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Rectangle(NamedTuple):
    """Some rows and columns of a matrix: where they begin, and how many."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    def of(self, matrix: Tensor) -> Tensor:
        """This part of a whole matrix, as a view."""
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]


class Shards(NamedTuple):
    """This rank's parts of some matrices.

    Attributes:
        shapes: of the whole matrices.
        rectangles: for each matrix, the parts of it that lie here, one after the other and row-major.
        owned: for each matrix, whether its parts count here: of equal copies on several ranks, those of one do.
        groups: summed over each of these in turn, what the ranks hold is complete.
    """

    shapes: tuple[tuple[int, int], ...]
    rectangles: tuple[tuple[Rectangle, ...], ...]
    owned: tuple[bool, ...]
    groups: tuple[dist.ProcessGroup, ...]

    def pieces(self, parts: Sequence[Tensor]) -> Iterator[tuple[int, Rectangle, Tensor]]:
        """The matrix's number, the rectangle, and the view of it in ``parts``, this rank's part of each matrix."""
        for i, (rectangles, part) in enumerate(zip(self.rectangles, parts, strict=True)):
            flat, at = part.reshape(-1), 0
            for rectangle in rectangles:
                yield i, rectangle, flat[at : at + rectangle.size].view(rectangle.rows, rectangle.columns)
                at += rectangle.size

    def total(self, partial: Tensor) -> Tensor:
        """The sum of ``partial`` over the ranks, in place. The same bits on each of them."""
        for group in self.groups:
            dist.all_reduce(partial, group=group)
        return partial

    @torch.no_grad()
    def whole(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The matrices, from this rank's part of each. All ranks must call it."""
        sizes = [rows * columns for rows, columns in self.shapes]
        flat = torch.zeros(sum(sizes), dtype=floating_state_dtype(parts), device=parts[0].device)
        matrices = [m.view(shape) for m, shape in zip(flat.split(sizes), self.shapes, strict=True)]
        held = [(r.of(matrices[i]), piece) for i, r, piece in self.pieces(parts) if self.owned[i]]
        if held:
            torch._foreach_copy_([target for target, _ in held], [piece for _, piece in held])
        self.total(flat)
        return [m.to(part.dtype) for m, part in zip(matrices, parts, strict=True)]


def rectangles_of(start: int, count: int, columns: int) -> tuple[Rectangle, ...]:
    """What ``count`` elements of a row-major matrix are, from element ``start`` on: whole rows, and parts of two."""
    row, column = divmod(start, columns)
    found = []
    if column and count:
        found.append(Rectangle(row, column, 1, min(count, columns - column)))
        row, count = row + 1, count - found[0].size
    if rows := count // columns:
        found.append(Rectangle(row, 0, rows, columns))
        row, count = row + rows, count - rows * columns
    if count:
        found.append(Rectangle(row, 0, 1, count))
    return tuple(found)


def are_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    kinds = set(map(type, tensors)) - {Tensor, torch.nn.Parameter}
    # Nobody has made one where that module was never imported, which takes its time.
    module = sys.modules.get("torch.distributed.tensor") if kinds else None
    return module is not None and any(issubclass(kind, module.DTensor) for kind in kinds)


def are_gathered(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether FSDP2 manages any of these modules: it may show plain parameters, whose gradients it takes away again."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    # Not getattr, which a module answers slowly for what it lacks.
    return any(module.__dict__.get("_is_fsdp_managed_module", False) for module in modules)


def shards_of(matrices: Sequence[Tensor]) -> Shards:
    """Where the shards of 2-d DTensors lie; plain tensors among them are the same on all ranks.

    Raises:
        ValueError: they lie on several device meshes, or are neither sharded by rows or columns nor replicated.
    """
    from torch.distributed.tensor import DTensor, Shard

    meshes = {m.device_mesh for m in matrices if isinstance(m, DTensor)}
    if len(meshes) > 1:
        raise ValueError(f"model: expected its adapters on one device mesh, got {len(meshes)}")
    (mesh,) = meshes
    placements = [m.placements if isinstance(m, DTensor) else () for m in matrices]
    split = sorted({d for some in placements for d, p in enumerate(some) if type(p) is Shard})
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    owned = []
    for some in placements:
        copied = [d for d in split if not some or type(some[d]) is not Shard]
        owned.append(all(coordinate[d] == 0 for d in copied))
    rectangles = tuple((_rectangle(m),) for m in matrices)
    shapes = tuple((m.shape[0], m.shape[1]) for m in matrices)
    return Shards(shapes, rectangles, tuple(owned), tuple(mesh.get_group(d) for d in split))


def _rectangle(matrix: Tensor) -> Rectangle:
    if not are_sharded([matrix]):
        return Rectangle(0, 0, matrix.shape[0], matrix.shape[1])
    sharded: Any = matrix
    return _placed(tuple(matrix.shape), sharded.device_mesh, tuple(sharded.placements))


@lru_cache(maxsize=1024)
def _placed(shape: tuple[int, int], mesh: Any, placements: tuple[Any, ...]) -> Rectangle:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p) not in (Shard, Replicate) for p in placements):
        raise ValueError(f"model: expected adapters sharded by rows or columns, or replicated, got {placements}")
    (rows, columns), (row, column) = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Rectangle(row, column, rows, columns)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, outside autograd."""
    with torch.no_grad():
        sharded: Any = tensor
        return sharded.to_local() if are_sharded([tensor]) else tensor


class Whole(torch.autograd.Function):
    """Whole matrices of their shards, whose gradients are equal on all ranks: each takes its part of them."""

    @staticmethod
    def forward(ctx: Any, *matrices: DTensor) -> tuple[Tensor, ...]:
        """All matrices in one collective; plain tensors pass."""
        ctx.shards = shards_of(matrices)
        ctx.layouts = [(m.device_mesh, m.placements, m.shape, m.stride()) for m in matrices]
        return tuple(ctx.shards.whole([local_part(m) for m in matrices]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """The rectangles of the gradients."""
        from torch.distributed.tensor import DTensor

        parts = [r.of(grad).contiguous() for grad, (r,) in zip(grads, ctx.shards.rectangles, strict=True)]
        return tuple(
            DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
            for part, (mesh, placements, shape, stride) in zip(parts, ctx.layouts, strict=True)
        )


def are_partitioned(tensors: Iterable[Tensor]) -> bool:
    """Whether ZeRO-3 has left any of these parameters empty."""
    return "deepspeed" in sys.modules and any(map(_is_partitioned, tensors))


def _is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_shape") and tensor.shape != tensor.ds_shape


def whole_matrices(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices with those that are sharded or partitioned made whole, in one collective for all, differentiable.

    Only for what every rank computes alike from them: gradients of shards are not summed over the ranks. (ZeRO-3
    averages those that it gets, which leaves them as they are.)
    """
    result = list(matrices)
    if found := [i for i, m in enumerate(matrices) if are_sharded([m])]:
        for i, m in zip(found, Whole.apply(*(matrices[i] for i in found)), strict=True):
            result[i] = m
    if found := [i for i, m in enumerate(matrices) if are_partitioned([m])]:
        with sys.modules["deepspeed"].zero.GatheredParameters([matrices[i] for i in found]):
            for i in found:
                result[i] = matrices[i].clone()
    return result


__all__ = [
    "Rectangle",
    "Shards",
    "are_gathered",
    "are_sharded",
    "local_part",
    "rectangles_of",
    "shards_of",
    "whole_matrices",
]
