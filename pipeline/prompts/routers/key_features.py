"""What routers compare of a sample's keys: unit keys, and the same whitened by how the keys of all tasks vary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from pipeline.data.keys import Keys

SHRUNK = 0.1  # of the mean variance is added to the variance of every direction
# A shorter difference of a unit key to the mean is not raised to length 1 where keys do not differ otherwise. Rounding
# to float16 moves a unit key by 3e-4, and a batch of another size or another device by up to 1e-3.
LEAST = 1e-2
KINDS = ("image", "text")


def unit_keys(keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """Image keys [B, K] and text keys [B, K] of length 1, and 1 for each sample without an image [B, 1], in float32.

    The image key of a sample without an image is 0.
    """
    pictured = keys.has_image.bool()[:, None]
    image = normalize(keys.image.float(), dim=-1).masked_fill(~pictured, 0.0)
    return image, normalize(keys.text.float(), dim=-1), (~pictured).float()


def side_by_side(keys: Keys, image_weight: float = 0.5) -> Tensor:
    """[a_v g_v; a_x g_x; no image] of B samples [B, 2 K + 1], with a_v^2 = 2 image_weight, a_x^2 = 2 - a_v^2."""
    image, text, missing = unit_keys(keys)
    return torch.cat([(2.0 * image_weight) ** 0.5 * image, (2.0 - 2.0 * image_weight) ** 0.5 * text, missing], dim=1)


def whitening(parts: Callable[[], Iterable[tuple[Keys, Tensor]]]) -> dict[str, Tensor]:
    """The means [K] and maps [K, K] of both kinds of keys, see `whitened`; in float32, computed in float64.

    CLIP's keys differ most in directions that say nothing of the task. The map is C^(-1/2) of their covariance C, to
    which `SHRUNK` of its mean eigenvalue is added; images are those of samples that have one. It is scaled such that a
    difference of length `LEAST` in a direction in which keys do not differ has length 1.

    Args:
        parts: gives keys with their weights [B], a part at a time; called twice for each kind.
    """
    found: dict[str, Tensor] = {}
    for place, kind in enumerate(KINDS):
        total, mean = 0.0, torch.zeros(0)
        for keys, weights in parts():
            counted = _counted(keys, weights, kind)
            added = counted @ unit_keys(keys)[place].double()
            total, mean = total + float(counted.sum()), added if total == 0.0 else mean + added
        mean = mean / max(total, 1e-300)
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for keys, weights in parts():
            centred = (unit_keys(keys)[place].double() - mean) * _counted(keys, weights, kind).sqrt()[:, None]
            covariance.addmm_(centred.T, centred)
        root = _inverse_root(covariance / max(total, 1e-300))
        found |= {f"{kind}.mean": mean.float(), f"{kind}.map": root.float()}
    return found


def whitened(keys: Keys, fitted: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As `unit_keys`, each key moved by the mean of its kind, mapped, and divided by its length if that is above 1.

    So where all tasks ask the same question, its key is about 0 and not what rounding has left of it.
    """
    image, text, missing = unit_keys(keys)
    image = normalize((image - fitted["image.mean"]) @ fitted["image.map"], dim=-1, eps=1.0) * (1.0 - missing)
    return image, normalize((text - fitted["text.mean"]) @ fitted["text.map"], dim=-1, eps=1.0), missing


def _counted(keys: Keys, weights: Tensor, kind: str) -> Tensor:
    """How much each key [B] of a kind counts: an image that is missing not at all."""
    return weights.double() * keys.has_image.double() if kind == "image" else weights.double()


def _inverse_root(covariance: Tensor) -> Tensor:
    """The symmetric root [K, K] of the inverse of a shrunk covariance, with eigenvalues of at most 1 / `LEAST`."""
    width = len(covariance)
    # Rounding alone has a variance of 1e-7 in all directions together.
    added = max(SHRUNK * float(covariance.trace()) / width, SHRUNK * 1e-7 / width)
    values, vectors = torch.linalg.eigh(covariance + added * torch.eye(width, dtype=covariance.dtype))
    return (vectors * (added / values).clamp(0.0, 1.0).sqrt()) @ vectors.T / LEAST
