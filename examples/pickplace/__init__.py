"""A small world of everyday things, to record, train and evaluate in.

Imports ``apt`` and below.
"""
