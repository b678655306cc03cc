"""Several runs in a row."""
