"""Entry point of ``adalora-kernels``: one subcommand a file, imported when it is called."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from adalora_kernels import __version__
from adalora_kernels.backends.select import ENVIRONMENT_VARIABLE, Backend, parse
from adalora_kernels.cli.extras import quiet_optional_packages, require_extra

_MODULES = {
    "bench": "adalora_kernels.cli.bench",
    "env": "adalora_kernels.cli.env",
    "check": "adalora_kernels.cli.check",
    "demo": "adalora_kernels.cli.demo.run",
    "export": "adalora_kernels.cli.export",
    "ranks": "adalora_kernels.cli.ranks",
}
_EXTRAS = {
    "bench": ("bench", ("peft", "jinja2", "matplotlib")),
    "demo": ("demo", ("peft", "matplotlib")),
    "export": ("peft", ("peft",)),
    "ranks": ("demo", ("matplotlib",)),
}
# Fewer steps leave no room for AdaLoRA's three phases.
_LEAST_STEPS = 6
_CHECKPOINT = "folder with adapter_config.json and adapter_model.safetensors, as PEFT saves it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; None for the command line's.

    Returns:
        The exit status, 0 where all went well.
    """
    arguments = _parser().parse_args(argv)
    try:
        parse(os.environ.get(ENVIRONMENT_VARIABLE) or None)
    except ValueError as error:
        raise SystemExit(f"adalora-kernels: {ENVIRONMENT_VARIABLE}: {error}") from None
    if arguments.command in _EXTRAS:
        require_extra(arguments.command, *_EXTRAS[arguments.command])
    quiet_optional_packages()
    status: int = import_module(_MODULES[arguments.command]).main(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adalora-kernels", description="Kernel-accelerated AdaLoRA for PyTorch.")
    parser.add_argument("--version", action="version", version=f"adalora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="versions, devices, backends, and why each can or can't run")
    commands.add_parser("check", help="self-test of every backend that can run here")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small DeBERTa-v3 through PEFT and through our kernels, side by side",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=_steps, default=300, help="optimizer steps of each training")
    demo.add_argument("--seed", type=int, default=0, help="of every random choice")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the table and the picture")
    names = [backend.value for backend in Backend]
    demo.add_argument("--backend", choices=names, default=None, help="use this one and no other")
    demo.add_argument("--device", type=_device, default="cpu", help="where to train, such as cpu or cuda")
    _add_bench(commands)
    _add_export(commands)
    ranks = commands.add_parser("ranks", help="heat map and budget of a saved AdaLoRA adapter")
    ranks.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    ranks.add_argument(
        "--output", type=Path, default=Path("ranks.png"), help="the picture, or a folder for it (default: ranks.png)"
    )
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="the benchmarks of a source checkout, or the page that shows their records"
    )
    bench.add_argument("--report", action="store_true", help="measure nothing; write a page and its plots")
    bench.add_argument(
        "--results", type=Path, metavar="DIR", help="with --report: folder of records (default: the checkout's)"
    )
    bench.add_argument(
        "--output", type=Path, metavar="DIR", help="with --report: folder to write into (default: benchmark-report)"
    )


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="a saved AdaLoRA adapter as plain LoRA, or merged into its base")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write into")
    form = export.add_mutually_exclusive_group()
    form.add_argument("--merged", action="store_true", help="write the base model with the adapter in its weights")
    form.add_argument(
        "--uniform-rank",
        action="store_true",
        help="fill every layer up to the largest rank with zeros, for engines without rank_pattern",
    )
    export.add_argument("--base", metavar="MODEL", help="with --merged: folder or hub name; default: the adapter's own")


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if steps < _LEAST_STEPS:
        raise argparse.ArgumentTypeError(f"expected at least {_LEAST_STEPS} steps, got {steps}")
    return steps


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this machine has no GPU that PyTorch can use")
    return text


__all__ = ["main"]
