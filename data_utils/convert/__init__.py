"""Other formats to episode files: ``python -m data_utils.convert FORMAT --help``. Imports no torch."""
