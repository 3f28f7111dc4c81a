"""Drawing pictures with a pipeline, keeping them in folders, and arranging them in grids."""
