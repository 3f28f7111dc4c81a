"""Keeps messages of libraries about themselves from the terminal; errors and messages about the user's input stay.

Such messages are of deprecations inside the libraries, of optional packages that nothing here needs, and of files that
are missing without harm. This must be called before the libraries are imported, so the package calls it first of all.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

LIBRARIES = ("transformers", "diffusers", "peft", "accelerate", "huggingface_hub", "bitsandbytes")
# {logger: beginning of a message} of errors that are none: a model has no safetensors, and its .bin is read instead.
HARMLESS = {"diffusers.models.modeling_utils": "An error occurred while trying to fetch"}


def quiet_libraries() -> None:
    """Let libraries print errors only, unless the user has set their verbosity or Python's warnings."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, beginning in HARMLESS.items():
        logging.getLogger(name).addFilter(_without(beginning))
    if not sys.warnoptions:
        for name in LIBRARIES:
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{name}(\.|$)")


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    """A filter that drops messages with this beginning."""
    return lambda record: not record.getMessage().startswith(beginning)
