"""What a step changes, how it is written down, and how it is read back."""
