"""What `fit` does: the closed form, gradient steps, checkpoints, tracking."""
