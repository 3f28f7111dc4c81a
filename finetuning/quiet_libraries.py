"""Keeps from the terminal what libraries say about themselves: deprecations inside of them, optional packages that
nothing here needs, files that they try and do without. Their errors, and what they say about a user's input, stay.

Takes effect only before those libraries are imported, and therefore first of all in this package.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = ("transformers", "diffusers", "peft", "accelerate", "huggingface_hub", "bitsandbytes")
# Logged as an error and none, {logger: beginning}: of a model without safetensors, whose .bin is read instead.
HARMLESS = {"diffusers.models.modeling_utils": "An error occurred while trying to fetch"}


def quiet_libraries() -> None:
    """Only errors of the libraries, unless the user has set their verbosity or Python's warnings."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, beginning in HARMLESS.items():
        logging.getLogger(name).addFilter(lambda record, text=beginning: not record.getMessage().startswith(text))
    if not sys.warnoptions:
        for name in LIBRARIES:
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{name}(\.|$)")
