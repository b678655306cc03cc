"""File formats of LoRAs."""
