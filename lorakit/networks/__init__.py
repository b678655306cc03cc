"""Adapters: LoRA and DoRA layers, networks of them, and their tensors in files."""
