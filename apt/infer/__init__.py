"""Planning with a trained policy."""
