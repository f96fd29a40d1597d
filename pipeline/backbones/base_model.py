"""Fingerprints of base models."""

from __future__ import annotations

import logging

from pipeline.hub.snapshots import Source, checkpoint
from pipeline.hub.weights import SCHEME, file_fingerprints, tensors_fingerprint

log = logging.getLogger("pipeline.backbones.base_model")


def fingerprint(source: Source, recorded: str | None = None) -> str:
    """Fingerprint of a model's tensors, see `weights.tensors_fingerprint`; fetches the checkpoint if necessary.

    Runs and adapters of older versions `recorded` a fingerprint by another scheme. If it is still this model's, it is
    returned, so that they stay usable. Raises UserError when weights are missing.
    """
    folder = checkpoint(source).folder
    if recorded is not None and not recorded.startswith(SCHEME):
        *with_weights, without = file_fingerprints(folder)
        if recorded in with_weights:
            return recorded
        if recorded == without:
            log.warning(
                "The fingerprint recorded for '%s' covers config.json only, because its weights had not been fetched; "
                "the weights found now are assumed to be the same.",
                source.path,
            )
            return recorded
    return tensors_fingerprint(folder)
