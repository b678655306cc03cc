"""Quantization, block swap, activation checkpointing and compilation."""
