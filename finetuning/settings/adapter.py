"""The settings of what is trained: BOFT, LoRA, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.settings.fields import Group, setting

BLOCK_SIZE = 8  # features in a block of BOFT, unless size or number is given


@dataclass
class AdapterSettings(Group):
    """What is trained: BOFT, LoRA, or without either the whole model"""

    use_boft: bool = setting(False, "Orthogonal butterfly fine-tuning.", common=True)
    boft_block_size: int | None = setting(
        None,
        "Features in a block, b. None or 0 = by --boft_block_num, and 8 if that is not given either.",
        minimum=0,
        common=True,
    )
    boft_block_num: int | None = setting(
        None, "Blocks a layer. None or 0 = by --boft_block_size.", minimum=0, common=True
    )
    boft_n_butterfly_factor: int = setting(
        1, "Butterfly factors, m. 1 = a block-diagonal rotation.", minimum=1, common=True
    )
    boft_dropout: float = setting(0.0, "Probability that a block's rotation is dropped.", minimum=0, maximum=0.99)
    boft_bias: str = setting("none", "Biases that are trained too.", choices=("none", "all", "boft_only"))
    boft_scale_learning_rate: float | None = setting(
        None, "Rate of the scale s. 0 = s stays 1, a pure rotation; None = --learning_rate.", minimum=0
    )
    boft_target_modules: list[str] = setting(
        ["attention"],
        "Layers of the UNet: a preset (attention, attention+feed-forward, transformer = also the projections "
        "around it, all = also the convolutions of the residual blocks) or endings of module names.",
    )
    use_lora: bool = setting(False, "Low-rank adaptation (peft).", common=True)
    rank: int = setting(8, "Rank of LoRA.", minimum=1, common=True)
    lora_alpha: float | None = setting(None, "LoRA's alpha. None = the rank.", above=0)
    lora_dropout: float = setting(0.0, "Dropout before LoRA's first matrix.", minimum=0, maximum=0.99)
    lora_target_modules: list[str] = setting(["attention"], "As --boft_target_modules, for LoRA.")

    def __post_init__(self):
        if self.use_boft and not self.boft_block_size and not self.boft_block_num:
            self.boft_block_size = BLOCK_SIZE  # what is used is what is recorded

    @property
    def kind(self) -> str:
        return "boft" if self.use_boft else "lora" if self.use_lora else "full"

    def faults(self) -> Iterator[str]:
        if self.use_boft and self.use_lora:
            yield "--use_boft and --use_lora: choose one"
        if not self.use_boft:
            yield from self._without_effect(("boft_", "--use_boft"))
        if not self.use_lora:
            yield from self._without_effect(("lora_", "--use_lora"), ("rank", "--use_lora"))
        if self.use_boft and self.boft_block_size and self.boft_block_num:
            yield (
                f"--boft_block_size={self.boft_block_size} and --boft_block_num={self.boft_block_num}: "
                "one follows from the other; give one and leave the other 0"
            )

    def _without_effect(self, *families: tuple[str, str]) -> Iterator[str]:
        defaults = type(self)()
        for prefix, flag in families:
            for name, value in vars(self).items():
                if name.startswith(prefix) and value != getattr(defaults, name):
                    yield f"--{name}={value}: has no effect without {flag}; add it or drop this flag"
