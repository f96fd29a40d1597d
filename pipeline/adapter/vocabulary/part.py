"""The token that marks where the vectors of a request go: prompt sets that travel as a part of a chat message.

vLLM prints a part of the type `prompt_embeds` as this token, which it adds to the vocabulary itself, and refuses every
such request where the embedding table has no row for it (docs/design.md 7.8).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from pipeline.adapter.vocabulary.tokens import REPLACEMENT, Added, Probe, quoted
from pipeline.config.models import ModelConfig

PLACEHOLDER = "<prompt_embeds>"  # as vLLM spells it
HIDDEN_PLACEHOLDER = (PLACEHOLDER, f"<prompt{REPLACEMENT}embeds>")
VECTORS = "prompt_vectors"  # the template's argument: whether the first message is vectors and nothing else


@dataclass(frozen=True)
class PartToken(Added):
    """The placeholder of one part, which stands for as many vectors as the part has."""

    first: int
    identity: str

    def texts(self) -> list[str]:
        return [PLACEHOLDER]

    @property
    def hidden(self) -> tuple[str, str]:
        return HIDDEN_PLACEHOLDER

    def inserted(self) -> str:
        return f"""{{#- With the argument {VECTORS} the first message is a part of vectors, which go where prompt sets
stand. The part's token is replaced in everything that other messages contain. -#}}
{{%- set set_tokens = "" %}}
{{%- if {VECTORS} | default(false, true) %}}
{{%- set set_tokens = {quoted(PLACEHOLDER)} %}}
{{%- set messages = messages[1:] %}}
{{%- endif %}}"""

    def probes(self) -> list[Probe]:
        part = {"role": "user", "content": [{"type": "text", "text": PLACEHOLDER}]}
        return [Probe({}, [], []), Probe({VECTORS: True}, [part], [self.first])]


def identity_of_places(base_model: str, model: ModelConfig, insertion: str) -> str:
    """Sixteen digits that another frozen model, precision, reading of questions or insertion changes.

    `base_model` is the frozen model's fingerprint. Sets are not part of it: all that fit such a checkpoint may be sent.
    """
    settings = [model.dtype, model.template, model.image_tokens, model.image_padding]
    return hashlib.sha256(json.dumps([base_model, settings, insertion]).encode()).hexdigest()[:16]
