"""Circuits of a weight-sparse transformer: the few nodes that do a task, and what they mean."""
