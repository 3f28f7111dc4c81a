"""What was trained, in the formats of other programs; each function returns what its format cannot hold."""
