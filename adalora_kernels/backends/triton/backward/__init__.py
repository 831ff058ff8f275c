"""The backward, a file for each plan: kernels and ``backward(grad_y, x, u, weight, adapter, needs)``.

All plans compute what ``reference.svd_linear.backward`` does: dx, dA, dE and dB, from the u of any forward.
"""
