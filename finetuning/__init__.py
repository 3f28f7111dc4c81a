"""What both trainers share: settings, data, base model, objective, adapters, run, checkpoints, pictures."""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # diffusers' imports warn of a torchvision not needed here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed, of an optional kernel
