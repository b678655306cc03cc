"""Base models: what the engine asks of them, and Stable Diffusion."""
