"""The check of a well-known model that is not on this machine, by the numbers that ship with the project."""

from __future__ import annotations

from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import refuse_vicuna
from pipeline.check.findings import Findings
from pipeline.hub.known_models import known_since
from pipeline.planning.memory_plan import ASSUMED_ANSWER, ASSUMED_TEXT
from pipeline.planning.model_files import PROBE_SIZE, ModelFiles

SHIPPED = "shipped numbers"
PHOTOGRAPH = f"a photograph of {PROBE_SIZE[0]} x {PROBE_SIZE[1]} pixels"


def check_shipped(findings: Findings, model: ModelFiles) -> str:
    """What the shipped numbers say of a model, in words; a warning where a photograph leaves no room for a question.

    Raises UserError where the model cannot have the recipe's template or its limit of image tokens.
    """
    settings, config = model.settings, model.planned
    family = family_of(config.model_type)
    refuse_vicuna(settings, family)
    parameters = sum(parameter.numel() for parameter in model.built.parameters())
    stored = str(getattr(config, "dtype", None) or "an unknown precision").removeprefix("torch.")
    image = model.assumed_tokens().image
    limit = "" if settings.image_tokens is None else f" (at most {settings.image_tokens})"
    room = settings.max_length - image
    if room < ASSUMED_TEXT + ASSUMED_ANSWER:
        findings.warnings[SHIPPED] = [
            f"{PHOTOGRAPH} takes {image} of the {settings.max_length} tokens of model.max_length, which leaves {room} "
            "for question and answer. Raise model.max_length, or lower model.image_tokens."
        ]
    return (
        f"{settings.path}: {config.model_type}, {parameters:,} parameters, stored in {stored}; {PHOTOGRAPH} takes "
        f"{image} tokens{limit}; numbers that ship with the project (read {known_since(settings.path)}), for planning "
        "alone"
    )
