"""Z-Image and Z-Image-Turbo: one stream of image and caption, with Qwen3 as text encoder."""
