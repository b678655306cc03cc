"""Observers: progress, checkpoints, validation, previews, logs, uploads."""
