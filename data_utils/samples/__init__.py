"""What does the policy see at one frame? Training and serving share the answer.

Imports ``index`` and below, and torch.
"""
