"""BOFT, orthogonal butterfly fine-tuning (https://arxiv.org/abs/2311.06243), as a peft tuner.

Importing this package makes peft use it wherever BOFT is asked for: `get_peft_model`, `PeftModel.from_pretrained`,
`add_adapter` of diffusers and transformers. `boft.unregister()` undoes that.

    from boft import BOFTConfig
    from peft import get_peft_model

    model = get_peft_model(model, BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["to_q"]))
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.boft import BOFTConfig as _PeftBOFTConfig
from peft.tuners.boft import BOFTModel as _PeftBOFTModel
from peft.utils import PeftType

from boft.combination import add_weighted_adapter, set_strength
from boft.config import BOFTConfig
from boft.convolution import Conv2d
from boft.layer import BOFTLayer
from boft.linear import Linear
from boft.model import BOFTModel

__all__ = [
    "BOFTConfig",
    "BOFTLayer",
    "BOFTModel",
    "Conv2d",
    "Linear",
    "add_weighted_adapter",
    "register",
    "set_strength",
    "unregister",
]


# The one place where peft is changed. Its list of methods is a closed enum and its `register_peft_method` refuses a
# name that is taken, but every look-up of a method's classes goes through these two dictionaries at call time.
def register() -> None:
    """Puts this package behind `PeftType.BOFT`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOFT] = BOFTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BOFT] = BOFTModel


def unregister() -> None:
    """Puts peft's own classes back. Models that already have an adapter keep it."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOFT] = _PeftBOFTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BOFT] = _PeftBOFTModel


register()
