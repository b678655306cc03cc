"""The config file: its sections, reading, writing and help texts. Imports no torch."""
