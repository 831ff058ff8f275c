"""The budget engine: importance, AdamW, orthogonality and masking, each for all layers of a model in one launch."""
