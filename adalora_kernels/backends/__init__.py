"""Who computes: the compiled extension, Triton, or the reference; and the choice between them."""
