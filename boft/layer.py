"""What the layers that replace a model's own share: parameters, dropout, the call. Strengths are in `boft.strength`,
merging is in `boft.merging`, enabling and deleting in `boft.switching`.

A layer holds the parameters of its adapters and decides how to reach the output: through the base layer (disabled,
merged, or nothing to apply), through a cached rotated weight where nothing trains, or in the `differentiable` of
`boft.linear` and `boft.convolution`: through a product of `boft.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from boft.base_layer import call_base_layer
from boft.functional import rotated_weight
from boft.memory import RotatedWeight, Solved
from boft.merging import MergingLayer
from boft.mixed_batch import mixed_batch
from boft.offloading import base_is_offloaded, execution_device, is_offloaded, onloaded
from boft.rotation import dtype_of_products, rotate_weight
from boft.shape import resolve
from boft.strength import StrengthLayer, StrengthTensors
from boft.super_blocks import super_blocks
from boft.switching import SwitchingLayer
from boft.tracing import is_traced


class BOFTLayer(StrengthLayer, MergingLayer, SwitchingLayer):
    """What both layers share: parameters, strength, dropout, merging.

    Parameters of an adapter, under peft's names and in peft's shapes, at least float32:

    * `boft_R` (m, D, b, b): zeros in a fresh adapter. Factor i is the Cayley transform of its skew part.
    * `boft_s` (out_features, 1) for linear, (1, out_channels) for convolutions: the scales, ones in a fresh adapter.
    """

    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_dropout", "scaling", "factor_scaling", "strength_tensors")

    # Whether a layer in which nothing trains keeps its rotated weight, a second copy of the base weight, so that an
    # unmerged adapter rotates nothing from the second call on. False: rotate again in every call.
    keep_rotated_weight = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs) -> None:
        MergingLayer.__init__(self)
        SwitchingLayer.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.boft_R = nn.ParameterDict({})
        self.boft_s = nn.ParameterDict({})
        self.boft_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.factor_scaling: dict[str, tuple[float, ...] | None] = {}
        self.strength_tensors = StrengthTensors()
        self.frozen_peft_weight_names = {}  # adapter -> names of its parameters that do not learn
        # Of peft and diffusers. No input is cast to the dtype of the weight here, so that there is nothing to disable.
        self.cast_input_dtype_enabled = True
        self.solved = Solved()
        self.rotated_weight = RotatedWeight()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # Parameters

    def update_layer(self, adapter_name: str, config, **kwargs) -> None:
        """Adds an adapter. Raises ValueError where the blocks do not fit the layer."""
        d, m = self.rotated_features(self.get_base_layer()), config.boft_n_butterfly_factor
        b, D = resolve(d, config.boft_block_size, config.boft_block_num, m)
        self.boft_dropout[adapter_name] = config.boft_dropout
        self.scaling[adapter_name] = 1.0
        self.factor_scaling[adapter_name] = None
        self.strength_tensors.write(adapter_name, 1.0, (1.0,) * m)
        if not getattr(config, "boft_train_scale", True):
            self.frozen_peft_weight_names[adapter_name] = ("boft_s",)
        self.boft_R[adapter_name] = nn.Parameter(torch.zeros(m, D, b, b))
        self.boft_s[adapter_name] = nn.Parameter(torch.ones(self.scale_shape()))
        self.reset_boft_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_boft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """True: the identity. False: random, with the deviations that peft uses."""
        R, s = self.boft_R[adapter_name], self.boft_s[adapter_name]
        if init_weights:
            nn.init.zeros_(R)
            nn.init.ones_(s)
        else:
            nn.init.normal_(R, mean=0.0, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)

    def set_shape(self, adapter_name: str, m: int, D: int, b: int) -> None:
        """Gives an adapter other blocks, for a checkpoint whose tensors differ from its configuration."""
        R = self.boft_R[adapter_name]
        zeros = torch.zeros(m, D, b, b, dtype=R.dtype, device=R.device)
        self.boft_R[adapter_name] = nn.Parameter(zeros, requires_grad=R.requires_grad)
        self.factor_scaling[adapter_name] = None
        self._settings_changed(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the adapter to where the base weight is; unlike in peft, it stays in float32 (or higher): in half
        precision, s = 1 + 0.001 is 1 and small updates are lost."""
        base = self.get_base_layer()
        base_device, base_dtype = self._get_base_layer_device_and_dtype(base)
        device = device or (execution_device(base) if base_is_offloaded(base) else base_device)
        for parameters in (self.boft_R, self.boft_s):
            parameter = parameters[adapter_name]
            if parameter.device.type == "meta":
                continue
            dtype = torch.float64 if torch.float64 in (parameter.dtype, base_dtype) else torch.float32
            if (parameter.device, parameter.dtype) != (device, dtype):
                moved = parameter.detach().to(device or parameter.device, dtype)
                parameters[adapter_name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Puts the parameters of an adapter into the dtype of the base layer, if it is a float of 16 bits or more."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            return
        for parameters in (self.boft_R, self.boft_s):
            parameter = parameters[adapter_name]
            if parameter.dtype != dtype:
                cast = parameter.detach().to(dtype)
                parameters[adapter_name] = nn.Parameter(cast, requires_grad=parameter.requires_grad)

    def combine(self, adapters: Sequence[str], weights: Sequence[float], into: str) -> None:
        """Writes a weighted combination into another adapter of this layer: S = Σ wᵢ Sᵢ for every factor, which is
        again skew-symmetric, and s = 1 + Σ wᵢ (sᵢ - 1). Strengths count; adapters that are not here add nothing."""
        present = [(name, weight) for name, weight in zip(adapters, weights) if name in self.boft_R]
        with torch.no_grad():
            R = sum(weight * self.scaled_parameters(name) for name, weight in present)
            s = sum(weight * self.scaling[name] * (self.boft_s[name] - 1) for name, weight in present) + 1
            if R.shape != self.boft_R[into].shape:
                self.set_shape(into, *R.shape[:3])
            self.boft_R[into].copy_(R)
            self.boft_s[into].copy_(s)

    # From parameters to rotations

    def parameters_of(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """R and s, past the look-ups of `nn.Module` and `nn.ParameterDict`, of which a training step would make a
        dozen a layer."""
        modules = self._modules
        return modules["boft_R"]._parameters[adapter], modules["boft_s"]._parameters[adapter]

    def applied_adapters(self) -> list[str]:
        """The active adapters that this layer has and that have any strength."""
        if torch.compiler.is_compiling():  # whatever the strength: another one is to need no other graph
            return [name for name in self.active_adapters if name in self.boft_R]
        solution = self.solved.find(self)
        if solution is not None:
            return solution.adapters
        return [name for name in self.active_adapters if self.scaling.get(name)]

    def trains(self, adapters: Sequence[str]) -> bool:
        """Whether gradients flow into the adapters or the base weight, or dropout makes every call another."""
        if any(self.drops(name) for name in adapters):
            return True
        if not torch.is_grad_enabled():
            return False
        if any(parameter.requires_grad for name in adapters for parameter in self.parameters_of(name)):
            return True
        weight = getattr(self.get_base_layer(), "weight", None)  # some quantized layers have it under other names
        return weight is not None and weight.requires_grad

    def drops(self, adapter: str) -> bool:
        """Whether multiplicative dropout is at work."""
        solution = self.solved.find(self)
        if solution is not None and adapter in solution.kept:
            return True
        return self.training and self.boft_dropout[adapter] > 0

    def scaled_parameters(self, adapter: str) -> Tensor:
        """R with the strengths in it, (m, D, b, b), at least float32."""
        R = at_least_float32(self.parameters_of(adapter)[0])
        if torch.compiler.is_compiling():
            return R * self.strength_tensors.of_factors(adapter, R)
        if self.strength(adapter) == (1, None):
            return R
        strengths = self.strengths(adapter)
        if len(set(strengths)) > 1:
            return torch.stack([alpha * factor for alpha, factor in zip(strengths, R)])
        return R * strengths[0]

    def solvable(self, adapter: str) -> Tensor:
        """What the Cayley transform starts from: the scaled parameters, in training less the dropped blocks."""
        R = self.scaled_parameters(adapter)
        if not self.drops(adapter):
            return R
        solution = self.solved.find(self)
        kept = None if solution is None else solution.kept.get(adapter)
        kept = draw_kept_blocks(R, self.boft_dropout[adapter]) if kept is None else kept
        return torch.where(kept, R, 0)

    def super_blocks(self, adapter: str) -> Tensor:
        """The super-blocks of B, (d / K, K, K): those that the model's hook has solved, or solved here."""
        solution = self.solved.find(self)
        is_shared = solution is not None and solution.is_shared()
        if is_shared and adapter in solution.blocks:
            return solution.blocks[adapter]
        if not is_shared or solution.is_running():
            return super_blocks(self.solvable(adapter))
        # Of a past forward pass, in which they were no part of the segment that is computed again:
        with torch.no_grad():
            blocks = super_blocks(self.solvable(adapter))
        return blocks.requires_grad_(self.parameters_of(adapter)[0].requires_grad)

    def blocks_for(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """The super-blocks, in the dtype that multiplies tensors of this dtype."""
        blocks = self.super_blocks(adapter)
        return blocks.to(dtype_of_products(dtype, blocks.device))

    def divides(self) -> bool:
        """Whether it is known that no scale is near 0."""
        solution = self.solved.find(self)
        return solution is not None and solution.divides

    def product(self, blocks: Tensor, s: Tensor, R: Tensor) -> tuple | None:
        """Looks up once what every call in a forward pass needs. Called by the model's hook, with the super-blocks of
        the one adapter that is applied, in the dtype of the product, its scales, and what the blocks are made of."""
        return None

    def scales(self, adapters: Sequence[str]) -> Tensor:
        """Product of the adapters' scales with their strengths, o elements in the shape of `scale_shape`."""
        result = None
        for name in adapters:
            s = at_least_float32(self.parameters_of(name)[1])
            if torch.compiler.is_compiling():
                s = torch.lerp(torch.ones_like(s), s, self.strength_tensors.of_scales(name, s))
            elif (alpha := self.strength(name)[0]) != 1:
                s = 1 + alpha * (s - 1)
            result = s if result is None else result * s
        return result

    def effective_weight(
        self, adapters: Sequence[str], base: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """diag(s) W Bᵀ over all given adapters, in the shape of the base weight; rotated in float32, then cast.

        Args:
            adapters: Names of the adapters, one or more.
            base: W; None = the base weight as it is.
            dtype: Of the result; None = that of the base weight.
        """
        base = self.get_base_weight() if base is None else base
        W = at_least_float32(self._as_rows(base))  # (o, d)
        for name in adapters:
            W = rotate_weight(W, self.super_blocks(name))
        return self._from_rows(W * self.scales(adapters).view(-1, 1)).to(dtype or base.dtype)

    def frozen_weight(self, adapters: Sequence[str]) -> Tensor:
        """The effective weight, kept from call to call while nothing that it was made of changes."""
        weight = self.rotated_weight.current(self, adapters)
        if weight is not None:
            return weight
        # A tensor made in inference mode could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_weight(adapters)
            if self.keep_rotated_weight:
                self.rotated_weight.keep(self, adapters, weight)
        return weight

    def weight_for(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """The effective weight while nothing trains, in the dtype in which it multiplies x."""
        base = self.get_base_layer().weight
        if not mixes_dtypes(x, base):
            return self.frozen_weight(adapters)
        with torch.no_grad():
            return self.effective_weight(adapters, dtype=x.dtype)

    def differentiable_weight(self, adapters: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """The effective weight, with gradients of the adapters and of the base weight, as far as they train."""
        W, s = self._as_rows(self.get_base_layer().weight), self.scales(adapters)
        W = W if dtype is None else W.to(dtype)
        if len(adapters) == 1 and not W.requires_grad:
            blocks = self.blocks_for(adapters[0], W.dtype)
            return self._from_rows(rotated_weight(blocks, W, s, self.divides()))
        for name in adapters:
            W = rotate_weight(W, self.blocks_for(name, W.dtype))
        return self._from_rows((W * s.view(-1, 1)).to(W.dtype))

    # The call

    def forward(self, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Tensor:
        """The base layer's output with its weight rotated and scaled, in the dtype of x.

        `adapter_names`: the adapter of each element of the batch, see `boft.mixed_batch`.
        """
        if is_offloaded(self) and not x.is_meta:
            with onloaded(self):
                return BOFTLayer.forward(self, x, *args, adapter_names=adapter_names, **kwargs)
        if adapter_names is not None:
            return mixed_batch(self, x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        solution = self.solved.find(self)
        is_disabled = self.disable_adapters if solution is None else solution.disabled
        adapters = self.applied_adapters()
        if is_disabled or self.merged or not adapters:
            return self.unadapted(x, *args, **kwargs)
        if solution is not None:
            solution.note_gradient_mode()
        return self.adapted(x, adapters, *args, **kwargs).to(x.dtype)

    def adapted(self, x: Tensor, adapters: Sequence[str], *args, **kwargs) -> Tensor:
        """The output with adapters that have some strength."""
        trains = self.trains(adapters)
        if trains:
            self.rotated_weight.forget()
        if not self.base_is_plain():
            return self.through_base_layer(x, adapters, *args, **kwargs)
        if trains or is_traced(x, *self.parameters_of(adapters[0])):
            return self.differentiable(x, adapters)
        return self.product_with(x, self.weight_for(x, adapters))

    def unadapted(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output, in the dtype of x, in which a plain layer multiplies, too."""
        weight = self._modules["base_layer"]._parameters.get("weight")
        if weight is not None and mixes_dtypes(x, weight) and self.base_is_plain():
            return self.product_with(x, weight).to(x.dtype)
        return self.base_layer(x, *args, **kwargs).to(x.dtype)

    def through_base_layer(self, x: Tensor, adapters: Sequence[str], *args, **kwargs) -> Tensor:
        """The output of a base layer with hooks or a forward of its own."""
        return call_base_layer(
            self.base_layer,
            self.standard_forward(),
            lambda x: self.differentiable(x, adapters),
            lambda: self.differentiable_weight(adapters),
            x,
            *args,
            **kwargs,
        )

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "boft." + nn.Module.__repr__(self)


# Multiplicative dropout (BOFT, Section 4).
def draw_kept_blocks(R: Tensor, p: float) -> Tensor:
    """Which blocks of the factors R (m, D, b, b) stay, bool (m, D, 1, 1); others become the identity, which is the
    Cayley transform of zeros.

    Drawn on the device, for every layer and every training step anew: each of the m · D blocks is dropped with
    probability p, independently of all others. Any p > 0 has an effect, the expected share is p, and the result stays
    orthogonal, so that nothing needs to be rescaled. The paper draws in two stages, a share p1 of the components and
    then a share p2 of the blocks of each; peft and this layer have one p, here with every component drawn (p1 = 1).
    """
    return torch.rand(*R.shape[:2], 1, 1, device=R.device) >= p


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, or a float32 copy of one in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def mixes_dtypes(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight has to be cast to multiply x: they multiply in the dtype of x, or in that of autocast."""
    return x.dtype != weight.dtype and not is_autocast(x.device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies: autocast's where it is enabled, else that of the input."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x.device) else x.dtype


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is enabled for a device. The meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
