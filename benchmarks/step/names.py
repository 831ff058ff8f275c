"""What steps and their contestants are called in records; it imports nothing, so that readers of records can."""

PEFT, OURS, OURS_SWEPT, OURS_AGAIN = "PEFT AdaLoRA", "ours", "ours, AdaLoraAdamW", "ours, once more"
LORA, FULL, FROZEN = "PEFT LoRA", "full fine-tuning", "frozen model"
PHASES = ("forward", "backward", "optimizer", "budget engine")
# What a record's benchmark is: the same step run as it is, as one CUDA graph, and by torch.compile.
EAGER, GRAPHED, COMPILED = "training step", "training step, CUDA graph", "training step, torch.compile"
DEBERTA = "DeBERTa-v3-base, 32×128"
RANK, TARGET = 12, 8  # the paper's, at its largest budget


def eager(contestant: str) -> str:
    """A contestant that is run as it is, beside others that are not."""
    return f"{contestant}, eager"


__all__ = [
    "COMPILED",
    "DEBERTA",
    "EAGER",
    "FROZEN",
    "FULL",
    "GRAPHED",
    "LORA",
    "OURS",
    "OURS_AGAIN",
    "OURS_SWEPT",
    "PEFT",
    "PHASES",
    "RANK",
    "TARGET",
    "eager",
]
