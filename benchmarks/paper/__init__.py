"""The methods, tasks and figures of AdaLoRA (ICLR 2023, arXiv 2303.10512), runnable."""
