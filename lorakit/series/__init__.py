"""Several runs in a row: all validated first, each trained in its own process, results compared at the end."""
