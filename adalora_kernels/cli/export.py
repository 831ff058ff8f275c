"""``adalora-kernels export CHECKPOINT --output DIR``: an AdaLoRA checkpoint as plain LoRA, or merged into its base."""

from __future__ import annotations

import argparse

from adalora_kernels.cli.errors import make_folder, plain_errors
from adalora_kernels.integrations.adapter import Adapter, read_checkpoint
from adalora_kernels.integrations.base_model import load_base
from adalora_kernels.integrations.export import merge_into, write_lora, write_model


def main(arguments: argparse.Namespace) -> int:
    """Export; always 0.

    Raises:
        SystemExit: the checkpoint or the base can't be read, they don't fit, or the folder can't be written to.
    """
    with plain_errors("export"):
        if arguments.base and not arguments.merged:
            raise ValueError("--base: expected it with --merged alone, a LoRA needs no base; leave it out")
        adapter = read_checkpoint(arguments.checkpoint)
        if arguments.merged:
            model = load_base(adapter, arguments.base)
            merge_into(model, adapter)
            make_folder(arguments.output)
            write_model(model, arguments.output)
            what = f"{type(model).__name__} with the increments of {_layers(adapter)} in its weights"
        else:
            make_folder(arguments.output)
            write_lora(adapter, arguments.output, uniform_rank=arguments.uniform_rank)
            what = f"LoRA of {_layers(adapter)}, rank {max(1, *adapter.ranks().values())} at most"
    print(f"{what}: {arguments.output}")
    return 0


def _layers(adapter: Adapter) -> str:
    ranks = adapter.ranks().values()
    return f"{sum(rank > 0 for rank in ranks)} of {len(ranks)} layers"


__all__ = ["main"]
