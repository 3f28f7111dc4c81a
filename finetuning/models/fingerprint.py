"""A short hash of a base model: every number of its weights at its place, the settings that change what is computed,
and the vocabulary. It says whether two runs stand on the same base, whatever its folder is called.

Weights are read as rows of 4096 integers of 8 bytes; a row is reduced to Σ aᵢ xᵢ mod 2⁶⁴ with fixed odd aᵢ, so that
any single change changes it, at about the speed of reading the weights; the rows' sums are hashed in order.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from finetuning.models.pipeline_family import PipelineFamily

ROW = 4096  # integers of 8 bytes
FORM = "all-"  # how a fingerprint of all weights begins; earlier versions wrote 16 hexadecimal digits and no prefix
# Of the text encoder's and the scheduler's settings, those that change what is computed in training:
TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "max_position_embeddings")
SCHEDULE_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
FLOW_SETTINGS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "time_shift_type",
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model.

    Attributes:
        value: the fingerprint that is recorded now.
        before: the fingerprint that earlier versions recorded of the same base; they read four numbers of each weight.
    """

    value: str
    before: str

    def __str__(self) -> str:
        return self.value

    def matches(self, recorded: object) -> bool:
        """Whether a recorded fingerprint, of the present form or of the earlier one, is that of this base."""
        if isinstance(recorded, str) and recorded.startswith(FORM):
            return recorded == self.value
        return recorded == self.before

    @classmethod
    def of(cls, base: PipelineFamily) -> Fingerprint:
        """The fingerprint of a base as it was loaded, before anything is cast, wrapped or trained."""
        parts = {name: base.part(name) for name in (*base.text_parts, "vae", base.denoiser_part)}
        digest, before = hashlib.blake2b(digest_size=16), hashlib.sha256()
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                few = parameter.detach().flatten()[:4].float().cpu()
                before.update(name.encode() + few.numpy().tobytes())
                plain = name.removeprefix("text_model.")  # a prefix in transformers 4, but not in 5
                digest.update(f"{part}.{plain} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(checksum(parameter.detach()))
        digest.update(json.dumps(settings(base), sort_keys=True, default=str).encode())
        return cls(FORM + digest.hexdigest(), before.hexdigest()[:16])


def checksum(tensor: torch.Tensor) -> bytes:
    """A checksum of every byte of a tensor and its place: 8 bytes for each whole row, and a hash of the rest."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    whole = len(data) // (8 * ROW) * (8 * ROW)
    rows = data[:whole].view(np.int64).reshape(-1, ROW)
    sums = np.einsum("ij,j->i", rows, MULTIPLIERS)  # mod 2⁶⁴
    return sums.tobytes() + hashlib.blake2b(data[whole:].tobytes(), digest_size=16).digest()


def settings(base: PipelineFamily) -> dict[str, Any]:
    """The settings that change what is computed with the weights, and hashes of the vocabularies.

    Settings at the libraries' defaults are left out, so that a default that a later version adds changes nothing.
    """
    found: dict[str, Any] = {part: dict(_unusual(base.part(part))) for part in (base.denoiser_part, "vae")}
    for part in base.text_parts:
        config, tokenizer = base.part(part).config, getattr(base, part.replace("text_encoder", "tokenizer"))
        mark = part.removeprefix("text_encoder")  # of the second one, "_2"
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        found[part] = {name: getattr(config, name, None) for name in TEXT_SETTINGS}
        found[f"vocabulary{mark}"] = hashlib.blake2b(vocabulary, digest_size=16).hexdigest()
        found[f"tokens{mark}"] = tokenizer.model_max_length
        if template := getattr(tokenizer, "chat_template", None):
            found[f"chat_template{mark}"] = template
    schedule = getattr(base, "noise_schedule", base.scheduler).config
    names = SCHEDULE_SETTINGS if "prediction_type" in schedule else FLOW_SETTINGS
    found["schedule"] = {name: schedule.get(name) for name in names}
    return found | {name: getattr(base, name) for name in base.settings_that_count}


def _unusual(module: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a model of diffusers that differ from the defaults of its class."""
    config: Mapping[str, Any] = module.config
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in config and (value := _as_list(config[name])) != _as_list(parameter.default):
            yield name, value


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _multipliers() -> np.ndarray:
    """Fixed odd integers of 64 bits, (ROW,)."""
    blocks = (hashlib.blake2b(i.to_bytes(8, "little")).digest() for i in range(ROW // 8))
    return np.frombuffer(b"".join(blocks), dtype="<i8") | 1


MULTIPLIERS = _multipliers()
