"""Where is it between two frames, and where in the image?

Imports nothing of the house but ``data_utils.errors``; no torch.
"""
