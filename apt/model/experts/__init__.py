"""How does an action expert turn features into motion? The interface that every expert meets, and the experts.

Imports ``apt.model.objectives``, ``apt.model.layers`` and below; knows no encoder.
"""
