"""Base models: one file a family, one interface."""

import transformers

transformers.utils.logging.set_verbosity_error()  # diffusers' imports warn of a torchvision that nothing here needs
transformers.utils.logging.disable_progress_bar()

import diffusers  # noqa: E402

diffusers.utils.logging.set_verbosity_error()  # it warns of casts that are meant
diffusers.utils.logging.disable_progress_bar()
