"""Weight-sparse training: projection to the largest weights, training on a fixed support."""
