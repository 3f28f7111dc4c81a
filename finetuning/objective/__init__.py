"""The mathematics of training: how noise is added to latents, and what the model is asked to predict."""
