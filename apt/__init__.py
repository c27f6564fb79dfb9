"""APT: the model, the trainer and inference."""

__version__ = "0.1.0"
