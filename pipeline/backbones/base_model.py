"""Fingerprints of base models."""

from __future__ import annotations

import logging

from pipeline.backbones.lmm_processor import source_of
from pipeline.config.models import ModelConfig
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


def base_fingerprint(config: ModelConfig, recorded: str | None = None) -> str:
    """The base model's fingerprint (see `fingerprint`), with how its weights are quantised.

    Of a quantised model it is that of the checkpoint behind `nf4:` or `int8:`, so results of the one are not continued
    or answered with by the other.
    """
    mark = "" if config.quantization == "none" else f"{config.quantization}:"
    return mark + fingerprint(source_of(config), None if recorded is None else recorded.removeprefix(mark))


def of_the_checkpoint(base_model: str) -> str:
    """The fingerprint of the checkpoint in one of `base_fingerprint`, which what is not quantised depends on."""
    return base_model.removeprefix("int8:").removeprefix("nf4:")
