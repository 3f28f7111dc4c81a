"""What both trainers share: settings, data, base model, objective, adapters, run, checkpoints, pictures."""

from finetuning.quiet_libraries import quiet_libraries

quiet_libraries()
