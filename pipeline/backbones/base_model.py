"""What tells base models apart."""

from __future__ import annotations

import logging

from pipeline.hub.snapshots import Source, checkpoint
from pipeline.hub.weights import SCHEME, file_fingerprints, tensors_fingerprint

log = logging.getLogger("pipeline.backbones.base_model")


def fingerprint(source: Source, recorded: str | None = None) -> str:
    """A model's fingerprint, see `weights.tensors_fingerprint`; the checkpoint is fetched where it is not here.

    A run or adapter from before there was that scheme `recorded` another value; where it is still this model's it is
    returned, so that what was made with it can be gone on with. Raises UserError when weights are missing.
    """
    folder = checkpoint(source).folder
    if recorded is not None and not recorded.startswith(SCHEME):
        *with_weights, without = file_fingerprints(folder)
        if recorded in with_weights:
            return recorded
        if recorded == without:
            log.warning(
                "What was made with '%s' recorded its config.json and none of its weights, which were fetched "
                "later; these are taken to be the same.",
                source.path,
            )
            return recorded
    return tensors_fingerprint(folder)
