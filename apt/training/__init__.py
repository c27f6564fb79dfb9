"""How does a policy learn? From the shell's words to the saved step.

Imports ``apt.checkpoint``, ``apt.configs``, ``apt.model``, ``train_utils`` and below; knows neither ``apt.infer`` nor
``apt.ablation``.
"""
