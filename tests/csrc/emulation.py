"""csrc/cuda compiled by the host's C++ compiler, its kernels run on the CPU; see ``emulated/cuda_runtime.h``."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from adalora_kernels.reference.handover import Handover, LayerImportance
from adalora_kernels.reference.importance import TripletLayout
from adalora_kernels.reference.svd_linear import Adapter

CSRC = Path(__file__).parents[2] / "csrc"
EMULATED = Path(__file__).parent / "emulated"
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda" / "plan.cpp", *sorted(EMULATED.glob("*.cpp"))]
# No contraction, as in setup.py.
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-missing-field-initializers"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020A000000000000"
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def execute(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_into(folder: Path, source: Path, *defines: str) -> Path:
    """The object file of a source, CUDA or not."""
    target = folder / f"{source.name}.o"
    includes = [f"-I{EMULATED}", f"-I{CSRC}", *(flag for path in include_paths() for flag in ("-isystem", path))]
    execute("c++", *FLAGS, *includes, *defines, "-x", "c++", "-c", str(source), "-o", str(target))
    if source.suffix == ".cu":  # an attribute in the source would do it, but not in templates
        section = "--rename-section=.bss=emulated_shared,alloc,load,data,contents"
        execute("objcopy", "--set-section-flags=.bss=alloc,load,contents", section, str(target))
    return target


class Emulation:
    """The kernels in a shared library, with the signatures of ``backends.native``.

    Attributes:
        launches: lists of layers that the last call took.
    """

    def __init__(self, folder: Path, objects: Sequence[Path] = ()) -> None:
        """Link ``objects`` into a library in ``folder``; without any, compile all sources there first."""
        self._objects = list(objects) or [compile_into(folder, source) for source in SOURCES]
        target = folder / "emulated.so"
        execute("c++", "-shared", *map(str, self._objects), "-o", str(target))
        self._library = ctypes.CDLL(str(target))
        for name in ("importance_update", "finish", "mask_to_budget"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self.launches = 0

    def with_fault(self, folder: Path, old: str, new: str) -> Emulation:
        """Another one, with a piece of one source replaced: what a test must notice."""
        for place, source in enumerate(SOURCES):
            text = source.read_text(encoding="utf-8")
            if text.count(old) == 1:
                faulty = folder / source.name
                faulty.write_text(text.replace(old, new), encoding="utf-8")
                objects = list(self._objects)
                objects[place] = compile_into(folder, faulty)
                return Emulation(folder, objects)
        raise AssertionError(f"in no source once: {old}")

    def with_ops(self, folder: Path) -> Path:
        """A library that registers the ops of ``_C_cuda`` for the CPU as ``torch.ops.adalora_emulated``: the host's
        code around these kernels. To be loaded once in a process.
        """
        ops = compile_into(folder, EMULATED / "host" / "ops.cpp", "-DNDEBUG", "-DUSE_CUDA", TORCH_TARGET)
        target = folder / "emulated_ops.so"
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        execute("c++", "-shared", *map(str, self._objects), str(ops), *libraries, "-o", str(target))
        return target

    def draw_orders(self, seed: int) -> None:
        """From now on blocks and threads run in drawn orders; 0: in the order of their numbers."""
        self._library.draw_orders(ctypes.c_uint64(seed))

    def importance_update(
        self,
        layout: TripletLayout,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: Tensor,
        half: Tensor,
        scores: Tensor,
        beta1: float,
        beta2: float,
        handed_over: tuple[Handover, list[bool]] | None = None,
    ) -> Tensor:
        """As ``native.importance_update``, of contiguous tensors."""
        taken, launches = torch.zeros(1, dtype=torch.bool), ctypes.c_int64()
        left: list[Tensor | None] = [None] * 4
        if handed_over is not None:
            left = [torch.tensor(handed_over[1]), *handed_over[0]]
        problem = self._library.importance_update(
            ctypes.c_bool(state.dtype == torch.float64),
            _numbers([size for sizes in zip(*layout.shapes, strict=True) for size in sizes]),
            ctypes.c_int64(len(layout.shapes)),
            *_operands(params),
            *_operands(grads),
            *map(_address, (state, half, scores)),
            ctypes.c_double(beta1),
            ctypes.c_double(beta2),
            *map(_address, (taken, *left)),
            ctypes.byref(launches),
        )
        assert problem is None, problem.decode()
        self.launches = launches.value
        return taken

    def finish_gradients(
        self, t: Tensor, da_shares: Tensor, adapter: Adapter, importance: LayerImportance, ticket: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``native.finish_gradients``, of contiguous tensors."""
        params = [adapter.lora_A, adapter.lora_E, adapter.lora_B]
        grads = [torch.full_like(p, torch.nan) for p in params]
        term, slopes = importance.term, [None] * 3
        if term is not None:
            slopes = [term.slopes[term.offset_A :], term.slopes[term.offset_B :], term.scale]
        (R, K), N = adapter.lora_A.shape, adapter.lora_B.shape[0]
        numbers = [len(t), len(da_shares), t.shape[2], R, K, N, importance.state.numel() // 4, importance.first]
        tensors = [t, da_shares, *params, *importance.before, *grads, adapter.mask, *slopes, importance.state]
        tensors += [importance.half, importance.sums, importance.probes, ticket]
        problem = self._library.finish(
            _numbers([*numbers, *(_DTYPES[p.dtype] for p in params)]),
            _addresses(tensors),
            *map(ctypes.c_double, (adapter.scaling, importance.beta1, importance.beta2)),
        )
        assert problem is None, problem.decode()
        return grads[0], grads[1], grads[2]

    def mask_to_budget(
        self,
        scores: Tensor,
        lora_E: Sequence[Tensor],
        budget: int | Tensor,
        live: Tensor,
        enabled: Tensor | None = None,
    ) -> Tensor:
        """As ``native_cuda.mask_to_budget``; a tensor's budget is an int64."""
        threshold = scores.new_full((), torch.nan)
        number, on_device = (0, budget) if isinstance(budget, Tensor) else (budget, None)
        problem = self._library.mask_to_budget(
            ctypes.c_bool(scores.dtype == torch.float64),
            _address(scores),
            ctypes.c_int64(len(scores)),
            *map(_address, (live, enabled)),
            ctypes.c_int64(number),
            *map(_address, (on_device, threshold)),
            ctypes.c_int64(len(lora_E)),
            (ctypes.c_void_p * len(lora_E))(*(e.data_ptr() for e in lora_E)),
            *(_numbers([of(e) for e in lora_E]) for of in (len, lambda e: e.stride(0), Tensor.element_size)),
        )
        assert problem is None, problem.decode()
        return threshold


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None or tensor.numel() == 0 else tensor.data_ptr())


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    assert all(t is None or t.is_contiguous() for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*map(_address, tensors))


def _operands(tensors: Sequence[Tensor | None]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """Addresses, null where there is none, and dtypes."""
    return _addresses(tensors), _numbers([0 if t is None else _DTYPES[t.dtype] for t in tensors])
