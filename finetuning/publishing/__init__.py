"""What others read of a run: its card, its report, its place on the hub."""
