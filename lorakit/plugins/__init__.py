"""Finding plugins, building their components, and reporting their errors."""
