"""The schedule-free optimizers for lorakit."""
