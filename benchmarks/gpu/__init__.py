"""``python3 -m benchmarks.gpu``: the layer's GPU kernels, checked and then timed against what they replace."""
