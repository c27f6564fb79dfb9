"""Worked examples: simulators to record in, train on and evaluate in."""
