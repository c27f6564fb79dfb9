"""What a training run needs besides the model: back-ends, EMA, metrics, the run directory."""
