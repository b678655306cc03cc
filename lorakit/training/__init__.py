"""The engine: the loss, the loop, and the run around it."""
