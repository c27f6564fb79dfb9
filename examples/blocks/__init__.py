"""A small world to learn language in: does a policy take the block that is named, and put it where it is told?

Imports ``examples.pickplace``, whose simulator, expert and episode loop it shares, and below.
"""
