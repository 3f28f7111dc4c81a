"""Pictures from a pipeline, and grids of them."""
