"""The prompt sets that a front chooses from: read from a folder, and read again when it has grown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adapter.load import source_of
from pipeline.adapter.source import Source
from pipeline.adapter.vocabulary.export import ADAPTER, ROUTER, Form, insertion_of, places_of, require_rows
from pipeline.adapter.vocabulary.lora import require_loras, served_names
from pipeline.adapter.vocabulary.part import identity_of_places
from pipeline.adapter.vocabulary.tokens import identity_of
from pipeline.backbones.lmm_weights import DTYPES
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.errors import UserError
from pipeline.serve.front.form import LoraForm, PartsForm, SetForm, VocabularyForm


@dataclass(frozen=True)
class Folder:
    """Where prompt sets are, and how they are used.

    `path` is a run, an adapter or an exported checkpoint with sets. `model` and `clip` are the locations of the frozen
    models, None: as recorded.
    """

    path: Path
    form: Form
    unfamiliar: Unfamiliar | None = None
    model: str | None = None
    clip: str | None = None

    def read(self) -> Sets:
        """The sets that are there now; UserError where they are not to be read, or cannot be sent to an engine."""
        path, exported = self.path, (self.path / ROUTER).is_file()
        if exported and self.form != "vocabulary":
            raise UserError(f"'{path}' is an exported checkpoint; expected the run or the adapter whose sets are sent.")
        place = path / ADAPTER if exported else path
        source = source_of(place, self.model, self.clip, answers=False).with_unfamiliar(self.unfamiliar)
        if self.form == "lora":
            require_loras(source.method, source.pool, place)
        else:
            require_rows(source.method, source.pool, place)
        return Sets(place, source, _form(self.form, source))


def _form(kind: Form, source: Source) -> SetForm:
    names, dtype = source.pool.names, DTYPES[source.model.dtype]
    if kind == "vocabulary":
        return VocabularyForm(names, identity_of(names, source.pool.prompts, dtype))
    places = places_of(kind, insertion_of(source.method))
    identity = identity_of_places(source.base_model, source.model, places)
    if kind == "lora":
        return LoraForm(names, identity, served_names(source.pool))
    return PartsForm(names, identity, source.pool.prompts.to(dtype))


@dataclass(frozen=True)
class Sets:
    """The prompt sets in a folder, and the form in which an engine gets them."""

    place: Path
    source: Source
    form: SetForm

    def require_export(self, checkpoint: Path) -> None:
        """Raise UserError unless the checkpoint in a folder takes these sets."""
        try:
            listed: Any = json.loads((checkpoint / ROUTER).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{checkpoint}' has no readable {ROUTER} ({error}); expected a checkpoint that `python -m pipeline "
                f"export RUN DIR --as {self.form.kind}` writes."
            ) from None
        if not isinstance(listed, dict) or listed.get("identity") != self.form.identity:
            raise UserError(
                f"'{checkpoint}' was exported of other prompt sets than those of '{self.place}', in another form, or "
                f"by an earlier version; run `python -m pipeline export {self.place} DIR --as {self.form.kind}` and "
                "give the new folder."
            )

    def require_models_of(self, other: Sets) -> None:
        """Raise UserError unless these sets can take the place of others without another engine or CLIP."""
        differing = [
            what
            for what, same in (
                ("frozen model or place for its sets", self.form.identity == other.form.identity),
                ("CLIP", self.source.keys == other.source.keys),
            )
            if not same
        ]
        if differing:
            raise UserError(
                f"'{self.place}' has another {' and another '.join(differing)} than before; start the service anew."
            )
