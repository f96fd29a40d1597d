"""The forms in which an engine gets what was chosen: names of its vocabulary, vectors, or names of low-rank updates."""

from __future__ import annotations

import base64
import functools
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.adapter.vocabulary.export import Form
from pipeline.adapter.vocabulary.part import HIDDEN_PLACEHOLDER, VECTORS
from pipeline.adapter.vocabulary.tokens import ARGUMENT, HIDDEN_MARK, IDENTITY

TEMPLATE = "chat_template_kwargs"
RESERVED = (ARGUMENT, VECTORS, IDENTITY)  # arguments of the template that no client may give
KEPT = 64  # selections of sets whose encoded vectors are kept; of three sets of a 7B each takes 328 kB


class SetForm(ABC):
    """How the sets of a question are written into its request; `identity` has to be that of the engine's checkpoint."""

    kind: Form
    expected: str  # what the engine has to serve, and how
    # What no text of a message may contain, and what it becomes there; the checkpoint's template does the same.
    hidden: tuple[str, str] = HIDDEN_PLACEHOLDER
    # Fields by which a request could have the engine write a set's tokens, which then act on the rest of its answer.
    refused: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str], identity: str) -> None:
        self.names, self.identity = list(names), identity

    def write(self, fields: dict[str, Any], selected: Sequence[str], identity: str | None = None) -> None:
        """Ask for these sets, in the order of insertion, in the `fields` of a chat request.

        `identity` is what the checkpoint is expected to have, None: its own.
        """
        self.identify(fields, self.asked(fields, selected), identity)

    def identify(self, fields: dict[str, Any], arguments: dict[str, Any], identity: str | None = None) -> None:
        """Give a request's `fields` the template's arguments, and the identity that the checkpoint has to have."""
        fields[TEMPLATE] = {**fields.get(TEMPLATE, {}), **arguments, IDENTITY: identity or self.identity}

    @abstractmethod
    def asked(self, fields: dict[str, Any], selected: Sequence[str]) -> dict[str, Any]:
        """The arguments of the chat template that ask for sets; `fields` gets what else is sent."""


class VocabularyForm(SetForm):
    """Sets are runs of tokens in the checkpoint's vocabulary, and a request names them."""

    kind: Form = "vocabulary"
    expected = "the checkpoint that `python -m pipeline export RUN DIR --as vocabulary` writes of these sets"
    hidden = HIDDEN_MARK
    refused = ("logit_bias", "allowed_token_ids")

    def asked(self, fields: dict[str, Any], selected: Sequence[str]) -> dict[str, Any]:
        return {ARGUMENT: list(selected)}


class PartsForm(SetForm):
    """A request brings the vectors of its sets, as a message before the conversation's.

    `prompts` [T, L, D] are the sets in the model's precision.
    """

    kind: Form = "parts"
    expected = (
        "vLLM 0.32 or newer, started with --enable-prompt-embeds and the checkpoint that `python -m pipeline export "
        "RUN DIR --as parts` writes of this frozen model"
    )

    def __init__(self, names: Sequence[str], identity: str, prompts: Tensor) -> None:
        super().__init__(names, identity)
        self.prompts = prompts
        self._encoded = functools.lru_cache(KEPT)(self._encode)

    def asked(self, fields: dict[str, Any], selected: Sequence[str]) -> dict[str, Any]:
        if not selected:
            return {}
        return with_vectors(fields, self._encoded(tuple(selected)))

    def _encode(self, selected: tuple[str, ...]) -> str:
        """The vectors [m L, D] of m sets, encoded."""
        return encoded(self.prompts[[self.names.index(name) for name in selected]].flatten(0, 1))


class LoraForm(SetForm):
    """Modules are low-rank updates that the engine has loaded, and a request names its one as the model.

    `served` is what the engine calls each of them.
    """

    kind: Form = "lora"
    expected = (
        "vLLM started with the checkpoint that `python -m pipeline export RUN DIR --as lora` writes of this run, "
        "--enable-lora and all of its folder lora as --lora-modules"
    )

    def __init__(self, names: Sequence[str], identity: str, served: Mapping[str, str]) -> None:
        super().__init__(names, identity)
        self.served = served

    def asked(self, fields: dict[str, Any], selected: Sequence[str]) -> dict[str, Any]:
        for name in selected:  # at most one
            fields["model"] = self.served[name]
        return {}


def encoded(vectors: Tensor) -> str:
    """Vectors [n, D] as vLLM reads them: base64 of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(vectors.clone(), buffer)  # a view would bring all that it is a view of
    return base64.b64encode(buffer.getvalue()).decode()


def with_vectors(fields: dict[str, Any], vectors: str) -> dict[str, Any]:
    """Put encoded vectors before the messages of a request; returns the template's arguments that say so."""
    content = [{"type": "prompt_embeds", "data": vectors}]
    fields["messages"] = [{"role": "user", "content": content}, *fields["messages"]]
    return {VECTORS: True}
