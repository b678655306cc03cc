"""Logs of lorakit's runs on Weights & Biases: the observer `wandb`."""
