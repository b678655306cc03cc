"""The file formats that come with lorakit."""
