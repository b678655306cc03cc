"""Reading, hashing and merging weights."""
