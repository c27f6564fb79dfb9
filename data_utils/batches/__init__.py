"""Which samples come when, whatever becomes of the workers?

Imports ``samples`` and below, and torch.
"""
