"""What both trainers share: settings, data, base model, objective, adapters, run, checkpoints, pictures."""
