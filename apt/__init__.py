"""APT: the model, the trainer and inference."""
