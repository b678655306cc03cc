"""Finding plugins, building components and reporting their errors."""
