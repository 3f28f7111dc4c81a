"""What is trained on a UNet or a text encoder: BOFT, LoRA, or the whole module. Only this file knows `boft`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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
        module: call this one; the adapter's layers sit inside it.
        peft_model: peft's holder around the same module; None for full.
    """

    kind: str
    module: torch.nn.Module
    peft_model: PeftModel | None = None

    def named_trainables(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def count(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for _, p in self.named_trainables())

    def parameter_groups(self, rate: float, weight_decay: float, scale_rate: float | None = None) -> list[dict]:
        """Optimizer groups. The scale s has a rate of its own; it and the biases do not decay: 0 is not their rest."""
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.named_trainables():
            is_scale, is_bias = "boft_s" in name, name.endswith("bias")
            own_rate = scale_rate if is_scale and scale_rate is not None else rate
            decay = 0.0 if is_scale or (is_bias and self.kind != "full") else weight_decay
            groups.setdefault((own_rate, decay), []).append(parameter)
        return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, or the module in its own library's."""
        if self.peft_model is None:
            self.module.save_pretrained(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self.peft_model.peft_config["default"].save_pretrained(str(folder))

    def size(self) -> int:
        """Bytes that `save` writes, about."""
        state = self.module.state_dict() if self.peft_model is None else self.state()
        return sum(tensor.nbytes for tensor in state.values())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this adapter.

        Raises:
            InputError: the file is damaged or of another adapter.
        """
        try:
            if self.peft_model is None:
                state = {}
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
        """The adapter's tensors under peft's names."""
        state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    @contextmanager
    def disabled(self):
        """The base model, for as long as the block lasts. Impossible for kind full, which has changed it."""
        if self.peft_model is None:
            raise ValueError("a fully trained module cannot be switched back to its base")
        layers = [m for m in self.module.modules() if isinstance(m, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:  # peft's own switch would also turn gradients on for a frozen scale
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was in zip(layers, before):
                layer._disable_adapters = was

    @torch.no_grad()
    def rotation_angle(self) -> float | None:
        """Mean angle in degrees by which BOFT's blocks turn their planes, or None for other kinds.

        A skew S with eigenvalues ±iλ gives, by the Cayley map, a rotation by 2·atan(λ) in each of its planes.
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
def disabled(adapters: Iterable[Adapter]):
    """The base model behind all of them, for as long as the block lasts; fully trained modules stay as they are."""
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
    """Put BOFT on the layers whose names end in one of `targets` (or a preset); a fresh one changes nothing.

    Raises:
        InputError: no such layer, or a block size that a layer's features cannot be divided by.
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
    """Put peft's LoRA on layers; alpha None = rank."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=target_modules(targets, module, "--lora_target_modules", presets),
    )
    return _wrap(module, config, "lora", f"--rank={rank}")


def train_fully(module: torch.nn.Module) -> Adapter:
    """All weights of the module learn, in float32."""
    return Adapter("full", module.float().requires_grad_(True))


def target_modules(
    targets: Sequence[str],
    module: torch.nn.Module,
    flag: str,
    presets: Mapping[str, Sequence[str]] = UNET_PRESETS,
) -> list[str]:
    """The endings of layer names that presets or the user's own words mean, those that occur in this module.

    Raises:
        InputError: an ending that no layer has.
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
