"""What lmms-eval reads of the entry point `lmms_eval.models`: the name of the model and where its class is.

It imports nothing of the project that is not needed for that, because lmms-eval loads it whatever model it evaluates.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.models.registry_v2 import ModelManifest

NAME = "continual_prompts"


def manifest() -> Any:
    """The manifest of the model `continual_prompts`."""
    return ModelManifest(model_id=NAME, simple_class_path="pipeline.adapter.lmms_model.ContinualPrompts")
