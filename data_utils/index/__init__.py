"""Which episodes are there, without opening them again?

Imports ``checks`` and below; no torch.
"""
