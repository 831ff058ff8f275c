"""``adalora-kernels demo``: a small DeBERTa-v3 fine-tuned with AdaLoRA through PEFT and through our kernels."""
