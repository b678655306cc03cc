"""Grids of LoRA files and strengths."""
