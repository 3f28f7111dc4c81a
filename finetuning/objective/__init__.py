"""Noise, and what is asked back."""
