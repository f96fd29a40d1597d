"""TensorFloat-32: products of float32 numbers on GPUs with ten bits of mantissa, sums in float32."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TensorFloat-32: NVIDIA GPUs of compute capability 8 and up."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 8


def allow_tf32(device: torch.device | str | None) -> None:
    """Compute this process's float32 products in TensorFloat-32 from here on; logs where its device cannot.

    None: the GPU where there is one, as for weights that are partitioned while they are loaded.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if has_tf32(place):
        torch.set_float32_matmul_precision("high")
    else:
        log.info("model.tf32 does nothing on %s: TensorFloat-32 needs a GPU of compute capability 8.0 or newer", place)
