"""Files, randomness, data, logging: what knows nothing of the models."""
