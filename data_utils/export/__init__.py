"""Episode files to other formats: ``python -m data_utils.export --help``. Imports no torch."""
