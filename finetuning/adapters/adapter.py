"""What is trained on a UNet or a text encoder: BOFT, LoRA, or the whole module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from boft import BOFTConfig
from finetuning.errors import InputError
from finetuning.models.unet_layers import UNET_PRESETS
from finetuning.settings.adapter import BLOCK_SIZE

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass
class Adapter:
    """What is trained on one module.

    Attributes:
        kind: boft, lora or full.
        module: the module to be called; the adapter's layers are inside it.
        peft_model: peft's wrapper of the same module; None for full.
    """

    kind: str
    module: Any  # a torch.nn.Module that a library can save: of diffusers or transformers
    peft_model: PeftModel | None = None

    def named_trainables(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that are trained, with their names in the module."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for _, p in self.named_trainables())

    def parameter_groups(self, rate: float, weight_decay: float, scale_rate: float | None = None) -> list[dict]:
        """Groups of parameters for the optimizer.

        Neither BOFT's scale s nor an adapter's biases decay: decay pulls towards 0, and they start at 1 and at the
        base's values.

        Args:
            rate: the learning rate.
            weight_decay: of all other parameters.
            scale_rate: the learning rate of the scale s. None = `rate`.
        """
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.named_trainables():
            is_scale, is_bias = "boft_s" in name, name.endswith("bias")
            own_rate = scale_rate if is_scale and scale_rate is not None else rate
            decay = 0.0 if is_scale or (is_bias and self.kind != "full") else weight_decay
            groups.setdefault((own_rate, decay), []).append(parameter)
        return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, or a fully trained module in the format of its library."""
        if self.peft_model is None:
            self.module.save_pretrained(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self.peft_model.peft_config["default"].save_pretrained(str(folder))

    def size(self) -> int:
        """About how many bytes `save` writes."""
        state = self.module.state_dict() if self.peft_model is None else self.state()
        return sum(tensor.nbytes for tensor in state.values())

    def load(self, folder: Path) -> None:
        """Read what `save` has written into this adapter.

        Raises:
            InputError: the file is damaged, or belongs to another adapter.
        """
        try:
            if self.peft_model is None:
                state: dict[str, torch.Tensor] = {}
                for path in sorted(folder.glob("*.safetensors")):
                    state |= load_file(path)
                self.module.load_state_dict(state)
                return
            state = load_file(folder / ADAPTER_WEIGHTS)
            if set(state) != set(self.state()):
                raise ValueError("it adapts other layers")
            set_peft_model_state_dict(self.peft_model, state)
        except Exception as error:
            raise InputError(f"--resume_from_checkpoint: {folder} cannot be loaded ({error})") from error

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors on the CPU, under peft's names. Not for kind full."""
        state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off for as long as the block lasts, so that the module computes what the base does.

        Raises:
            ValueError: the kind is full, whose training has changed the base itself.
        """
        if self.peft_model is None:
            raise ValueError("a fully trained module cannot be switched back to its base")
        layers = [m for m in self.module.modules() if isinstance(m, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:  # peft's own switch would afterwards also train a scale that was frozen
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was in zip(layers, before):
                layer._disable_adapters = was

    @torch.no_grad()
    def rotation_angle(self) -> float | None:
        """The mean angle in degrees by which BOFT's blocks rotate their planes; None for other kinds.

        By the Cayley map a skew matrix S with eigenvalues ±iλ gives a rotation by 2·atan(λ) in each of its planes.
        """
        if self.kind != "boft":
            return None
        angles = []
        for name, R in self.module.named_parameters():
            if "boft_R" in name:
                S = (R - R.transpose(-1, -2)) / 2  # (m, D, b, b)
                angles.append(2 * torch.linalg.svdvals(S.float().cpu()).atan().flatten())
        return math.degrees(torch.cat(angles).mean())


@contextmanager
def disabled(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Switch several adapters off for as long as the block lasts; fully trained modules stay as they are."""
    with ExitStack() as stack:
        for adapter in adapters:
            if adapter.kind != "full":
                stack.enter_context(adapter.disabled())
        yield


def add_boft(
    module: torch.nn.Module,
    targets: Sequence[str],
    *,
    block_size: int = 0,
    block_num: int = 0,
    factors: int = 1,
    dropout: float = 0.0,
    bias: str = "none",
    train_scale: bool = True,
    presets: Mapping[str, Sequence[str]] = UNET_PRESETS,
) -> Adapter:
    """Put BOFT on layers of a module. A fresh adapter changes nothing.

    Args:
        targets: endings of the layers' names, or names of presets.
        block_size: b, rows of a block; block_num: blocks in a factor. Give one; both 0 = the default block size.
        factors: m, the number of butterfly factors.
        dropout: probability in [0, 1) with which a block is replaced by the identity.
        bias: which biases are trained, too: none, all, or boft_only.
        train_scale: train the scale s of each output neuron.
        presets: {name: endings of layers' names}.

    Raises:
        InputError: there is no such layer, or a layer's features cannot be divided into such blocks.
    """
    if not block_size and not block_num:
        block_size = BLOCK_SIZE
    config = BOFTConfig(
        boft_block_size=block_size,
        boft_block_num=block_num,
        boft_n_butterfly_factor=factors,
        boft_dropout=dropout,
        bias=bias,
        target_modules=target_modules(targets, module, "--boft_target_modules", presets),
        boft_train_scale=train_scale,
    )
    return _wrap(
        module, config, "boft",
        f"--boft_block_size={block_size}, --boft_block_num={block_num}, --boft_n_butterfly_factor={factors}",
    )  # fmt: skip


def add_lora(
    module: torch.nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    presets: Mapping[str, Sequence[str]] = UNET_PRESETS,
) -> Adapter:
    """Put peft's LoRA on layers of a module. A fresh adapter changes nothing.

    Args:
        targets, presets: as for `add_boft`.
        rank: of the update.
        alpha: the update is scaled by alpha / rank. None = rank.
        dropout: probability in [0, 1) with which an input feature is dropped.

    Raises:
        InputError: there is no such layer.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft computes with floats as well
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=target_modules(targets, module, "--lora_target_modules", presets),
    )
    return _wrap(module, config, "lora", f"--rank={rank}")


def train_fully(module: torch.nn.Module) -> Adapter:
    """Train all weights of a module, which are brought to float32."""
    return Adapter("full", module.float().requires_grad_(True))


def target_modules(
    targets: Sequence[str],
    module: torch.nn.Module,
    flag: str,
    presets: Mapping[str, Sequence[str]] = UNET_PRESETS,
) -> list[str]:
    """The endings of layers' names that are adapted in a module.

    Args:
        targets: names of presets, or endings, several of them separated by commas.
        flag: which the targets were given by, for the error.
        presets: {name: endings}; those of its endings that do not occur in the module are left out.

    Raises:
        InputError: an ending that is in no preset does not occur in the module.
    """
    endings = [e for target in targets for e in presets.get(target, [part.strip() for part in target.split(",")])]
    names = [name for name, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]

    def occurs(ending: str) -> bool:
        return any(name == ending or name.endswith("." + ending) for name in names)

    if absent := [e for e in endings if not occurs(e) and not any(e in preset for preset in presets.values())]:
        raise InputError(
            f"{flag}={','.join(absent)}: no layer of the {type(module).__name__} has such a name; "
            f"give endings of module names or one of {', '.join(presets)}"
        )
    others = {name for name, m in module.named_modules() if not isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}

    def spelled_out(ending: str) -> list[str]:
        """The ending, or the names that it stands for, where it is also the name of what is no layer."""
        if not any(name == ending or name.endswith("." + ending) for name in others):
            return [ending]
        return [name for name in names if name == ending or name.endswith("." + ending)]

    return [e for ending in dict.fromkeys(endings) if occurs(ending) for e in spelled_out(ending)]


def _wrap(module: torch.nn.Module, config: PeftConfig, kind: str, flags: str) -> Adapter:
    """Put peft's layers into a module; everything that is trained is then in float32.

    Raises:
        InputError: peft refuses the configuration; begins with `flags`.
    """
    try:
        peft_model = get_peft_model(module, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise InputError(f"{flags}: {' '.join(str(error).split())}") from error
    adapter = Adapter(kind, peft_model.get_base_model(), peft_model)
    halves = [name for name, p in adapter.named_trainables() if p.dtype != torch.float32]
    for name in halves:  # e.g. biases that train with bias="all" on a module in half precision
        parameter = adapter.module.get_parameter(name)
        parameter.data = parameter.data.float()
    return adapter
