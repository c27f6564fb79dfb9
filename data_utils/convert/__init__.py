"""How do other formats become episode files? ``python -m data_utils.convert FORMAT --help``.

Imports ``checks`` and below, no torch. LIBERO's converter needs its simulator, so it is named in ``__main__.py`` and
lives in ``examples``.
"""
