"""The processes of a run, its log, its trackers, and how it is stopped."""
