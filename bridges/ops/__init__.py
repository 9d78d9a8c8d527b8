"""Numerical operations that are worth a kernel: AbsTopK, KL, products with sparse matrices."""
