"""Model families: their configs and how they are detected."""
