"""What does training any model on many processes need? Back-ends, EMA, metrics, signals, stored features.

Knows no policy: imports ``data_utils`` and below, never ``apt``.
"""
