"""Finding channels of the sparse model that flip the dense model's answer, and measuring what they do."""
