"""``python -m benchmarks``: this machine's figures, of its CUDA device where it has one, else of its CPU."""

from __future__ import annotations

import torch

from benchmarks import cpu
from benchmarks.gpu import __main__ as gpu

if __name__ == "__main__":
    raise SystemExit(gpu.main() if torch.cuda.is_available() else cpu.main())
