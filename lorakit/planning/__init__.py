"""Estimates of a run before it starts: steps, memory and time."""
