"""Grids: the same prompts and seeds drawn with several LoRA files at several strengths, side by side."""
