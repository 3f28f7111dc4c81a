"""The settings of what is trained: BOFT, LoRA, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.settings.fields import Group, setting

BLOCK_SIZE = 8  # features in a block of BOFT if neither size nor number of the blocks is given


@dataclass
class AdapterSettings(Group):
    """What is trained: BOFT, LoRA, or without either the whole model"""

    use_boft: bool = setting(False, "Orthogonal butterfly fine-tuning.", common=True)
    boft_block_size: int | None = setting(
        None,
        "Features in a block, b. None or 0 = the number of blocks decides, or 8 if that is not given either.",
        minimum=0,
        common=True,
    )
    boft_block_num: int | None = setting(
        None, "Blocks in each layer. None or 0 = the size of the blocks decides.", minimum=0, common=True
    )
    boft_n_butterfly_factor: int = setting(
        1, "Butterfly factors, m. 1 = a block-diagonal rotation.", minimum=1, common=True
    )
    boft_dropout: float = setting(0.0, "Probability that a block's rotation is dropped.", minimum=0, maximum=0.99)
    boft_bias: str = setting(
        "none",
        "Biases that are trained too: those of all layers, or of the adapted ones (boft_only).",
        choices=("none", "all", "boft_only"),
    )
    boft_scale_learning_rate: float | None = setting(
        None,
        "Learning rate of the scale s. 0 = s stays 1, so that the adapter is a pure rotation; None = --learning_rate.",
        minimum=0,
    )
    boft_target_modules: list[str] = setting(
        ["attention"],
        "Adapted layers of the UNet: a preset (attention, attention+feed-forward, transformer = also the projections "
        "around it, all = also the convolutions of the residual blocks) or endings of module names.",
    )
    use_lora: bool = setting(False, "Low-rank adaptation (peft).", common=True)
    rank: int = setting(8, "Rank of LoRA.", minimum=1, common=True)
    lora_alpha: float | None = setting(None, "LoRA's alpha. None = the rank.", above=0)
    lora_dropout: float = setting(0.0, "Probability of dropout before LoRA's first matrix.", minimum=0, maximum=0.99)
    lora_target_modules: list[str] = setting(
        ["attention"], "Layers that LoRA adapts, given like --boft_target_modules."
    )

    def __post_init__(self):
        if self.use_boft and not self.boft_block_size and not self.boft_block_num:
            self.boft_block_size = BLOCK_SIZE  # so that the record of the run holds the size that is used

    @property
    def kind(self) -> str:
        """boft, lora, or full for the whole model."""
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
        """Settings that were changed although they do nothing. families: beginning of names, and the missing flag."""
        defaults = type(self)()
        for prefix, flag in families:
            for name, value in vars(self).items():
                if name.startswith(prefix) and value != getattr(defaults, name):
                    yield f"--{name}={value}: has no effect without {flag}; add it or drop this flag"
