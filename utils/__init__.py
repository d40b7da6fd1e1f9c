"""What knows nothing of the models: core <- data, evaluation, display <- training."""
