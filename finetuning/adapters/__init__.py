"""What is trained: put on a model, loaded again, mixed, merged, and taken off."""
