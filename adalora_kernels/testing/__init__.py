"""Inputs and error budgets that tests and benchmarks share; nothing in the package imports it."""
