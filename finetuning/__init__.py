"""What both trainers share: settings, data, base model, objective, adapters, run, checkpoints, pictures."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # diffusers' imports warn of a torchvision not needed here
