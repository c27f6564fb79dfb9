"""Building blocks of the action experts."""
