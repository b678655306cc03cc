"""Writing LoRA files and their metadata."""
