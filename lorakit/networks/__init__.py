"""Adapters: LoRA layers, networks of them, and how they are saved."""
