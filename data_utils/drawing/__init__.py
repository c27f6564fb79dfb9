"""How does a path look on an image? Lines, captions, MP4 files.

Imports ``geometry`` and the ground but ``types``; no torch.
"""
