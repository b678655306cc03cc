"""States: what is needed to resume a run."""
