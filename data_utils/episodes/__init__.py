"""What is an episode file, and how is one read, written and recorded? (``data_utils.h5io`` hands it on to users.)

Imports ``video``, ``geometry`` and the ground but ``types``; no torch.
"""
