"""Files: written atomically, read with errors that name them; fingerprints of models."""
