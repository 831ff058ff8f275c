"""The forward, a file for each plan: kernels and ``forward(x, weight, bias, base, adapter) -> (y, u)``.

All plans compute what ``reference.svd_linear.forward`` does, with u [M, rank_padding(R)] in the dtype of the products
and 0 in its columns past R, so that any of them goes with any backward.
"""
