"""LIBERO, LIBERO-PRO and LIBERO-plus: how does a policy do in them, and how do their demonstrations come in?

Runs in an environment of its own without torch; what plans in it imports ``apt.infer`` where it is asked for.
"""
