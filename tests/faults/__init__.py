"""Runs that are killed, interrupted, and refused what they want to write, and what they leave."""
