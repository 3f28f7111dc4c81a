"""Reads the parts of a base model from a pipeline's folder or from the hub; what fails is an InputError."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.config import InputError

FLAG = "--pretrained_model_name_or_path"


@contextmanager
def explained(name: str, revision: str | None = None, variant: str | None = None):
    """Turns any loading error of the libraries into one InputError that names the flag."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if not Path(name).exists():
            raise InputError(
                f"{FLAG}={name}: not loaded from the hub (revision {revision or 'main'}); check the name and the "
                f"network, or give a local folder. The library says: {text[:300]}"
            ) from error
        hint = f", variant {variant}" if variant else ""
        raise InputError(
            f"{FLAG}={name}{hint}: cannot be loaded; is it complete? The library says: {text[:300]}"
        ) from error


def fingerprint(parts: Iterable[torch.nn.Module]) -> str:
    """A short hash of the names and the first numbers of all parameters, whatever folder they came from."""
    digest = hashlib.sha256()
    for part in parts:
        for name, parameter in part.named_parameters():
            few = parameter.detach().flatten()[:4].float().cpu()
            digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


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
        kind = kind or getattr(diffusers, self.config()["scheduler"][1])
        with explained(self.name, self.revision):
            return kind.from_pretrained(self.name, subfolder="scheduler", revision=self.revision)
