"""States: saving, loading, and whether one can be resumed."""
