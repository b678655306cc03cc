"""The networks that come with lorakit."""
