"""What plugins import: hooks, components and what they build."""
