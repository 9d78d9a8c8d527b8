"""Rows of tokens: from text, from batches, or sampled from a model; and the bundled text."""
