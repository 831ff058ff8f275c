"""PEFT's layer of another version, in a process of its own that takes its turn among the contestants.

The parent hands over the tensors in a file and a line for each run; the child answers when it is done, so that the two
never compute at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Contestant

ROOT = Path(__file__).parents[2]
SETTLED = 0.05  # seconds after which OpenMP's idle threads sleep


def settled(prepare: Contestant) -> Contestant:
    """``prepare``, once the idle threads of the process that had its turn before have stopped spinning."""

    def prepared() -> Callable[[], object]:
        time.sleep(SETTLED)
        return prepare()

    return prepared


class Elsewhere:
    """A child process with one layer; a context manager.

    Args:
        folder: holds the other PEFT, for PYTHONPATH.
        threads: of the child.
        base: K → N, weight and bias.
        adapter: A, E and B.
        xs, gs: inputs and output gradients, which rotate.

    Attributes:
        version: of the child's PEFT.
        results: y and the gradients of x, A, E and B for the first input.
    """

    def __init__(
        self, folder: Path, threads: int, base: list[Tensor], adapter: list[Tensor], xs: list[Tensor], gs: list[Tensor]
    ) -> None:
        self._handed = tempfile.TemporaryDirectory()
        path = Path(self._handed.name) / "given.pt"
        given = {"base": base, "adapter": adapter, "xs": xs, "gs": gs, "threads": threads}
        torch.save({k: [t.detach() for t in v] if isinstance(v, list) else v for k, v in given.items()}, path)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
        command = [sys.executable, "-m", "benchmarks.micro.elsewhere", str(path)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment, cwd=ROOT,
        )  # fmt: skip
        self.version = self._answer()
        self.results: list[Tensor] = torch.load(path.with_name("results.pt"))

    def run(self) -> None:
        """Forward and backward of the child's layer, on its next input."""
        assert self._child.stdin is not None
        self._child.stdin.write("run\n")
        self._child.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the process with another PEFT has ended with {self._child.wait()}")
        return line

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()
        self._handed.cleanup()


def main(path: Path) -> None:
    """The child: answers with its PEFT's version, then once for each line."""
    import peft

    from benchmarks.micro.layer import peft_layer

    given: dict[str, Any] = torch.load(path)
    torch.set_num_threads(given["threads"])
    (w, bias), adapter = given["base"], given["adapter"]
    layer = peft_layer(w.shape[1], w.shape[0], adapter[0].shape[0]).to(w.dtype)
    layer.ranknum["default"].requires_grad_(False)  # PEFT 0.21 lets it train over a 16-bit base
    own = [layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]]
    with torch.no_grad():
        base = layer.get_base_layer()
        for mine, value in zip((base.weight, base.bias, *own), (w, bias, *adapter), strict=True):
            mine.copy_(value)
    xs, gs = [x.requires_grad_() for x in given["xs"]], given["gs"]
    y = layer(xs[0])
    torch.save([y.detach(), *torch.autograd.grad(y, [xs[0], *own], gs[0])], path.with_name("results.pt"))
    print(peft.__version__, flush=True)
    for turn, _ in enumerate(sys.stdin):
        x, g = xs[turn % len(xs)], gs[turn % len(gs)]
        for leaf in (x, *own):
            leaf.grad = None
        layer(x).backward(g)
        print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


__all__ = ["Elsewhere", "settled"]
