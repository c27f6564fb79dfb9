"""How do episode files become other formats? ``python -m data_utils.export --help``.

Imports ``convert`` and below; no torch.
"""
