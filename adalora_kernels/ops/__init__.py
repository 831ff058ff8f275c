"""The public functions: they check, choose a backend and launch; each op's schema, fake and autograd live beside it."""
