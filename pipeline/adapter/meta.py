"""adapter.json: the contents of an adapter, and the models and data that it belongs to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config.method import MethodField
from pipeline.config.models import KeysConfig, ModelConfig

FORMAT_VERSION = 3  # since 3 the states of routers may keep routing keys
READ_VERSIONS = (2, 3)
TENSORS, META, PROJECTOR, CARD = "prompts.safetensors", "adapter.json", "projector.safetensors", "README.md"


class Meta(BaseModel):
    """The fields of adapter.json."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: int
    sets: list[str]
    tasks: list[str]
    recipe: str
    method: MethodField
    model: ModelConfig
    clip: KeysConfig
    base_model: str  # fingerprint
    keys: dict[str, str]  # identity of the CLIP
    max_new_tokens: int
    projector: str = "frozen"
    repetition_penalty: float | Literal["checkpoint"] = "checkpoint"  # default of adapters without the field
    scores: dict[str, float | None] = {}  # task -> last score in percent
    metrics: dict[str, Any] = {}
    licence: str | None = None
    sha256: str = ""  # of the prompt sets
    routing_sha256: str = ""  # of what the router has made of all tasks; empty where it is made when it is used
    projector_sha256: str = ""  # empty in adapters of earlier versions, and without a trained projector
