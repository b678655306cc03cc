"""What is in a dataset, and what training makes of it: `lorakit data`."""
