"""The cache of latents and encoded captions."""
