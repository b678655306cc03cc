"""A run: preparing it, setting it up, the loop, and what the loop calls."""
