"""A small world that the quickstart records, trains and evaluates in.

Imports ``apt`` and below.
"""
