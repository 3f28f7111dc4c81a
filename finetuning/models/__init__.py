"""Base models: one file for each family, one interface for all."""

import diffusers
import transformers

transformers.utils.logging.set_verbosity_error()  # its tokenizers warn of lengths that are checked here
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()  # it warns of casts that are meant
