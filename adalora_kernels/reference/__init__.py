"""The specification: every operation in plain PyTorch, in any dtype, with explicit gradients.

These functions are what the other backends are tested against, and what runs where no other backend can. They import
torch and nothing else of this package. Alphabet: M tokens, K in-features, N out-features, R rank; A = ``lora_A`` [R,
K], E = ``lora_E`` [R, 1], B = ``lora_B`` [N, R].
"""

from adalora_kernels.reference import allocation, importance, orthogonality, philox, svd_linear

__all__ = ["allocation", "importance", "orthogonality", "philox", "svd_linear"]
