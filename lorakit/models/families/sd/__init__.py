"""Stable Diffusion 1.x and 2.x: a U-Net, a VAE and one CLIP text encoder."""
