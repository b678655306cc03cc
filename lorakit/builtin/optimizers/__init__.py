"""The optimizers that come with lorakit."""
