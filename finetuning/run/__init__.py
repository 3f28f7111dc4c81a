"""The processes of a run, its steps, its log, its trackers, and how it is stopped."""
