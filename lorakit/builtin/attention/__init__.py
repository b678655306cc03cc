"""The attention backends that come with lorakit."""
