"""Models seen as chains of sublayers on one residual stream, and how they are loaded."""
