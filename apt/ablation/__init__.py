"""Which of many recipes is better? Grids of training runs, their evaluation, one table and chart (``apt.ablate``).

Imports ``apt.training``, ``apt.checkpoint``, ``apt.configs`` and below. What judges a policy in a simulator is named in
``evaluation.py``, never imported.
"""
