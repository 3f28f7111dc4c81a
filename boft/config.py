"""The settings of a BOFT adapter: peft's `BOFTConfig`, checked, and one field more."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.tuners.boft.config import BOFTConfig as PeftBOFTConfig
from torch import nn

BIAS_VALUES = ("none", "all", "boft_only")

# Fields that stock peft does not have. They stay out of `adapter_config.json`, or stock peft would warn when it
# loads the file.
OWN_FIELDS = ("boft_train_scale",)


@dataclass
class BOFTConfig(PeftBOFTConfig):
    """Configuration of a BOFT adapter, https://arxiv.org/abs/2311.06243.

    All fields of `peft.BOFTConfig` with peft's names, defaults and meaning. Exactly one of `boft_block_size` and
    `boft_block_num` is given, the other is 0.

    Args:
        boft_block_size: Edge b of a block. 0 = derive it from `boft_block_num`.
        boft_block_num: Blocks D per factor. 0 = derive it from `boft_block_size`; b · D = d, the input features.
        boft_n_butterfly_factor: Butterfly factors m. m = 1 is OFT; full depth is log2(D) + 1.
        target_modules: Names or regular expression of the layers to adapt.
        exclude_modules: Names or regular expression of layers to leave alone.
        boft_dropout: Probability with which each block of each factor is the identity in a training step, [0, 1).
        fan_in_fan_out: Whether the targets store their weight as (in, out), as GPT-2's `Conv1D` does.
        bias: Which biases train: "none", "all", or "boft_only" (those of the adapted layers).
        modules_to_save: Further modules that are trained in full and saved with the adapter.
        init_weights: True starts at the identity. False starts at random values, for tests.
        layers_to_transform, layers_pattern: Restrict the targets to layers of these indices.
        boft_train_scale: Whether the scales s learn. False keeps them at their values (1 in a fresh adapter), so that
            the adapter is a pure rotation. Not stored with the adapter: pass it again when training goes on,
            `BOFTConfig.from_pretrained(path, boft_train_scale=False)`. Inference does not need it.

    Raises:
        ValueError: For values out of range; all faults in one message.
    """

    boft_train_scale: bool = field(
        default=True, metadata={"help": "Whether the scales s learn; False makes the adapter a pure rotation."}
    )

    def __post_init__(self):
        faults = self._faults()
        if faults:
            raise ValueError("BOFTConfig: " + "; ".join(faults) + ".")
        super().__post_init__()

    def _faults(self) -> list[str]:
        faults = []
        b, D, m = self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor
        for name in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                faults.append(f"{name}={value!r} must be a whole number, 0 or more")
        if not faults and b == 0 and D == 0:
            faults.append("boft_block_size=0 and boft_block_num=0: one of the two must be given")
        if not faults and b != 0 and D != 0:
            faults.append(
                f"boft_block_size={b} and boft_block_num={D}: give one and set the other to 0, "
                "because their product is the layer's input features"
            )
        if m == 0:
            faults.append("boft_n_butterfly_factor=0 must be 1 or more (1 is OFT)")
        if not 0 <= self.boft_dropout < 1:
            faults.append(f"boft_dropout={self.boft_dropout} must lie in [0, 1)")
        if self.bias not in BIAS_VALUES:
            faults.append(f"bias={self.bias!r} must be one of {', '.join(map(repr, BIAS_VALUES))}")
        return faults

    def to_dict(self) -> dict:
        """What is written to `adapter_config.json`: peft's fields only."""
        return {key: value for key, value in super().to_dict().items() if key not in OWN_FIELDS}


def check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that torch cannot register parameters and modules by."""
    containers = nn.ParameterDict(), nn.ModuleDict()
    if not isinstance(name, str) or not name or "." in name:
        reason = "it must be a text without dots, because it becomes a part of the parameters' names"
    elif any(hasattr(container, name) for container in containers):
        reason = "torch's dictionaries of parameters and modules have an attribute of this name"
    else:
        return
    raise ValueError(f"adapter name {name!r}: {reason}; choose another one")
