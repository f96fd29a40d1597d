"""Frozen linear layers whose weights are stored in 8 or 4 bits and dequantised where they are used.

int8: a float32 scale per output and integers from -127 to 127; torch alone is needed. nf4: the sixteen quantiles of a
normal distribution with a float32 scale per 64 values (QLoRA, arXiv 2305.14314, section 3), by the kernels of
bitsandbytes. Both quantise weights only: inputs and products keep the precision of the step, so gradients are those of
the dequantised weights.
"""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.errors import UserError, require_extras

BLOCK = 64  # values that share a scale in nf4, the default of bitsandbytes
LEAST = (0, 50)  # of bitsandbytes; the first whose kernels on CPUs and GPUs are called by the same functions
FUSED = ("cuda",)  # kinds of devices on which bitsandbytes multiplies without dequantising the whole weight first
LARGEST = 127
PACKAGE, EXTRA = "bitsandbytes", "quantised"


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with quantised weights, made without values (on the meta device) to be loaded into.

    It is an `nn.Linear` so that whatever looks for linear layers finds it; `weight` has another type and shape:

    - int8: int8 [outputs, inputs], and a scale per output;
    - nf4: uint8 [ceil(outputs * inputs / 2), 1], and a scale per `BLOCK` values in row-major order.
    """

    def __init__(self, inputs: int, outputs: int, bias: torch.dtype | None, kind: str) -> None:
        """`bias` is the precision of the bias, None for a layer without."""
        nn.Module.__init__(self)  # torch's own would make a whole weight
        self.in_features, self.out_features, self.kind = inputs, outputs, kind
        shape = (outputs, inputs) if kind == "int8" else (-(-outputs * inputs // 2), 1)
        held = torch.empty(shape, dtype=torch.int8 if kind == "int8" else torch.uint8, device="meta")
        self.weight = nn.Parameter(held, requires_grad=False)
        # The bits of float32 numbers as integers: `module.bfloat16()`, which DeepSpeed calls, would round floats.
        scales = torch.empty(scale_count(inputs, outputs, kind), dtype=torch.int32, device="meta")
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(outputs, dtype=bias, device="meta"), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "nf4" and inputs.device.type in FUSED and not torch.is_grad_enabled():
            import bitsandbytes

            state = self._state(inputs.dtype)
            product: Tensor = bitsandbytes.matmul_4bit(inputs, self.weight, quant_state=state, bias=self.bias)
            return product
        output: Tensor = _Product.apply(inputs, self)
        return output

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights [outputs, inputs] in this precision."""
        if self.kind == "nf4":
            from bitsandbytes.functional import dequantize_4bit

            weight: Tensor = dequantize_4bit(self.weight, quant_state=self._state(dtype))
            return weight
        values = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        # Computed in float32 and rounded once, without a float32 copy of the weight.
        return torch.mul(self.weight, self.scales.view(torch.float32)[:, None], out=values)

    def _state(self, dtype: torch.dtype) -> Any:
        """How bitsandbytes reads the packed weight."""
        from bitsandbytes.functional import QuantState

        shape = torch.Size((self.out_features, self.in_features))
        scales = self.scales.view(torch.float32)
        return QuantState(absmax=scales, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """The product with a layer's dequantised weights, which exist only inside the forward and inside the backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return linear(inputs, layer.dequantised(inputs.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Weight and scales of a `QuantisedLinear`, of a floating-point weight [outputs, inputs] on any device."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return packed.view(-1, 1), state.absmax.float().view(torch.int32)
    values = weight.float()
    # A row of zeros has the scale of the smallest normal number, by which it may be divided.
    scales = (values.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scales[:, None]).round().to(torch.int8), scales.view(torch.int32)


def scale_count(inputs: int, outputs: int, kind: str) -> int:
    """Number of scales of a quantised layer."""
    return outputs if kind == "int8" else math.ceil(outputs * inputs / BLOCK)


def quantised_bytes(inputs: int, outputs: int, kind: str) -> int:
    """Bytes of a quantised layer's weight with its scales."""
    values = outputs * inputs
    return (values if kind == "int8" else -(-values // 2)) + 4 * scale_count(inputs, outputs, kind)


def require_quantiser(kind: str) -> None:
    """Raise UserError where the package that quantises in this way is missing or too old; imports nothing."""
    if kind != "nf4":
        return
    require_extras(EXTRA)
    found = metadata.version(PACKAGE)
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST:
        least = ".".join(map(str, LEAST))
        raise UserError(
            f"model.quantization nf4 needs {PACKAGE} {least} or newer, and {found} is installed; run `pip install "
            f'"{PACKAGE}>={least}"`.'
        )


def require_quantising(kind: str, device: torch.device) -> None:
    """Raise UserError where weights cannot be quantised in this way on a device, by doing so with a small one."""
    require_quantiser(kind)
    try:
        layer = QuantisedLinear(BLOCK, 2, None, kind)
        weight, scales = quantise(torch.ones(2, BLOCK, device=device), kind)
        layer.weight, layer.scales = nn.Parameter(weight, False), nn.Parameter(scales, False)
        layer.dequantised(torch.float32)
    # A package without a kernel for the device raises whatever its build and torch make of that.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.quantization {kind} is not possible on {device} ({reason}); expected a CPU, or a GPU that the "
            f"installed build of {PACKAGE} supports. Set model.quantization to none, or install another build."
        ) from error
