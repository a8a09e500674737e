"""Objectives: pure functions on tensors, one value a sample. They import only torch."""
