"""How does an action expert turn features into motion? The interface that every expert meets, and the experts.

Imports what lies below it in ``apt.model``; knows no encoder.
"""
