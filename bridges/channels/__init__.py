"""Finding channels of the sparse model that turn an answer, and measuring what they do."""
