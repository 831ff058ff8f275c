"""The command ``adalora-kernels``."""
