"""From frames to trajectories: how does a robot use a policy, in a program or over the network?

Imports ``apt.checkpoint``, ``apt.configs``, ``apt.model``, ``infer_utils``, ``train_utils`` and below; knows
neither ``apt.training`` nor ``apt.ablation``.
"""
