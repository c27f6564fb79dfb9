"""Is an episode file sound, and what does it hold? Asked in a process that may die of it.

Imports ``episodes``, ``h5io``, ``video``, ``geometry``, ``drawing`` and the ground (see ``data_utils``) but ``types``;
no torch.
"""
