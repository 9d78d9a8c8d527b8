"""The weight-sparse transformer, its configuration and its files."""
