"""Several runs one after the other: planned and checked together, each in a process of its own, compared at the end."""
