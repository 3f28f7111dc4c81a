"""What only control by an image has: control images, the networks that read them, pipelines, and scores."""
