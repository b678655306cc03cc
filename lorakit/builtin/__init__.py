"""What lorakit brings along, registered through the same entry points as any plugin."""
