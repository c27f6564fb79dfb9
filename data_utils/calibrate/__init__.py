"""Where are the cameras, and how do they bend the light? Boards, lenses, and poses from boards or from the gripper.

Imports ``rig``, ``h5io``, ``video``, ``drawing``, ``geometry`` and the ground but ``types``; no torch.
"""
