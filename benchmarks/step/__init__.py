"""Whole training steps: AdaLoRA through this package, through PEFT, PEFT's LoRA, and full fine-tuning."""
