"""What a user may type: the flags of all programs, and how command lines and YAML files are read."""
