"""Devices, processes, signals and out-of-memory handling."""
