"""Where is the hand when the joints stand so, and how do they stand when it is there?

Imports nothing of the house but ``data_utils.errors``, ``words`` and ``yaml_file``; no torch, and MuJoCo only where a
description is read.
"""
