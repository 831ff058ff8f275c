"""``adalora-kernels demo``: one AdaLoRA fine-tune through PEFT and through our kernels, side by side."""

from __future__ import annotations

import argparse
import time

import torch

from adalora_kernels import patch_model
from adalora_kernels.backends.select import select
from adalora_kernels.cli.demo.accuracy import judge
from adalora_kernels.cli.demo.model import PairEncoder, deberta_v3_config, encode_pairs, texts_of, train_tokenizer
from adalora_kernels.cli.demo.report import Outcome, rank_map_of, table
from adalora_kernels.cli.demo.settings import Settings
from adalora_kernels.cli.demo.text import read_corpus, split_corpus
from adalora_kernels.cli.demo.train import Contender, compare, train_base, with_adapter
from adalora_kernels.cli.errors import make_folder, plain_errors
from adalora_kernels.cli.rank_map import as_text, draw


def main(arguments: argparse.Namespace) -> int:
    """Run the demo from the command line; 0 where the run holds what it must.

    Raises:
        SystemExit: the backend asked for can't run, or the folder can't be made, with the reason.
    """
    settings = Settings(
        output=arguments.output,
        seed=arguments.seed,
        steps=arguments.steps,
        backend=arguments.backend,
        device=arguments.device,
    )
    try:
        select("svd_linear", torch.device(settings.device).type, torch.float32, settings.init_rank, settings.backend)
    except RuntimeError as error:
        raise SystemExit(f"adalora-kernels demo: {error}") from None
    with plain_errors("demo"):
        make_folder(settings.output)
    return run(settings)


def run(settings: Settings) -> int:
    """Train, judge and report. Writes ``table.txt`` and ``ranks.png`` into the folder ``settings.output``.

    Returns:
        0, or 1 where accuracy, losses or budget are not what they must be.
    """
    begin = time.perf_counter()
    outcome = train_and_judge(settings)
    text = table(outcome)
    table_path, picture_path = settings.output / "table.txt", settings.output / "ranks.png"
    table_path.write_text(text + "\n", encoding="utf-8")
    maps = [rank_map_of(contender, settings) for contender in (outcome.peft, outcome.ours)]
    draw(maps, f"Ranks after {settings.steps} steps, budget {settings.target_budget}", picture_path)
    print("", text, "", as_text(maps[1]), "", sep="\n")
    print(f"Table: {table_path}\nPicture: {picture_path}\nTook {time.perf_counter() - begin:.0f} s")
    failures = outcome.failures()
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def train_and_judge(settings: Settings) -> Outcome:
    """Read the corpus, train the base and both adaptations, judge all three on the held-out modules."""
    splits = split_corpus(read_corpus(settings.sources))
    # Words of the held-out modules stay unknown to the tokenizer too.
    signatures, summaries = texts_of(splits.base + splits.train)
    tokenizer = train_tokenizer(signatures + summaries, settings.vocabulary, settings.max_length)
    base_pairs, train_pairs, calibration, held_out = (
        encode_pairs(tokenizer, part, settings.device)
        for part in (splits.base, splits.train, splits.calibration, splits.held_out)
    )
    torch.manual_seed(settings.seed)
    config = deberta_v3_config(tokenizer.get_vocab_size(), settings.hidden_size, settings.layers, settings.max_length)
    base = PairEncoder(config).to(settings.device)
    train_base(base, base_pairs, settings)

    peft = Contender("PEFT", with_adapter(base, settings), settings)
    fused = patch_model(with_adapter(base, settings), backend=settings.backend)
    ours = Contender("adalora_kernels", fused, settings)
    compare([peft, ours], train_pairs, settings)
    return Outcome(
        settings=settings,
        base=judge(base, calibration, held_out),
        peft=peft,
        ours=ours,
        peft_correct=judge(peft.model, calibration, held_out),
        ours_correct=judge(ours.model, calibration, held_out),
        corpus={name: len(part) for name, part in vars(splits).items()},
    )


__all__ = ["main", "run", "train_and_judge"]
