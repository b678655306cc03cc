"""Latents and encoded captions on disk."""
