"""Edits of sparse channels, pushed into a dense model that runs as usual (`steer.py`)."""
