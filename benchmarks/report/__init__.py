"""One HTML page and its plots, made from the records in ``results/`` alone: ``adalora-kernels bench --report``."""
