"""Chooses the prompt sets of questions: routing alone, without the frozen model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pipeline.adapter.answer import Chosen
from pipeline.adapter.source import Source
from pipeline.backbones.clip import KeyEncoder
from pipeline.backbones.key_encoders import key_encoder
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.data.keys import Keys
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.routing import Routed


@dataclass(frozen=True)
class Question:
    """One question about at most one image (the file's bytes); `task` is for methods that need the task.

    `unfamiliar` is what becomes of it should it resemble no task; None: as the method says.
    """

    text: str
    image: bytes | None = None
    task: str | None = None
    unfamiliar: Unfamiliar | None = None


@dataclass(frozen=True)
class Routable:
    """What routing reads of a question; `pixels` [1, 3, H, W] are the key encoder's input, None without an image."""

    text: str
    task: int  # number of the task
    pixels: Tensor | None
    unfamiliar: Unfamiliar | None = None  # as of the question

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self.text) + (0 if self.pixels is None else self.pixels.nbytes)


class Chooser:
    """The key encoder and the routing of a pool; raises UserError when the encoder cannot be loaded.

    `encoder` is that of these keys if it is loaded already.
    """

    def __init__(
        self, source: Source, device: torch.device | str | None = None, encoder: KeyEncoder | None = None
    ) -> None:
        self.source, self.method = source, make_method(source.method)
        self.encoder = encoder or key_encoder(*source.keys.source, device=device)
        if self.method.routing.keeps_keys:
            self.method.routing.fitted(source.pool.states)  # now, so that the first question does not wait for it

    def of(self, source: Source) -> Chooser:
        """The routing of another pool with keys of the same encoder."""
        return Chooser(source, encoder=self.encoder)

    def read(self, question: Question, number: int = 1, picture: Image.Image | None = None) -> Routable:
        """Decode the image of a question and prepare it for routing; runs no model and is thread-safe.

        Args:
            question: the question.
            number: its number for messages.
            picture: its image if that is decoded already.

        Raises UserError for an image that cannot be read, and a missing or unknown task.
        """
        task = self.source.task_number(question.task)
        self.source.require_sight(question.unfamiliar)
        picture = decoded(question, number) if picture is None else picture
        return Routable(question.text, task, self.pixels(picture), question.unfamiliar)

    def pixels(self, picture: Image.Image | None) -> Tensor | None:
        """The key encoder's input [1, 3, H, W] of an image; None without one."""
        return None if picture is None else self.encoder.pixels([picture])

    def route(self, questions: Sequence[Routable], keys: Keys | None = None) -> Routed:
        """Select the modules of each question as for test samples; `keys` are theirs, where they are known already."""
        tasks = torch.tensor([question.task for question in questions], dtype=torch.long)
        routing = self.method.routing
        bare = torch.tensor([(one.unfamiliar or routing.unfamiliar) == "zero_shot" for one in questions])
        return routing.route(keys or self.keys(questions), self.source.pool.states, tasks, bare=bare)

    def chosen(self, routed: Routed, number: int) -> Chosen:
        """How a routed question came to its sets, in names and rounded numbers."""
        names, picked = self.source.pool.names, routed.selection.chosen(number)
        strange = None if routed.unfamiliar is None else bool(routed.unfamiliar[number])
        return Chosen(
            [names[index] for index, _ in picked],
            _rounded(names, routed.scores[number]),
            None if routed.selection.weights is None else {names[index]: round(weight, 4) for index, weight in picked},
            None if routed.probabilities is None else _rounded(names, routed.probabilities[number]),
            strange,
        )

    def keys(self, questions: Sequence[Routable]) -> Keys:
        """The routing keys of N questions."""
        text = self.encoder.text([question.text for question in questions])
        pixels = [question.pixels for question in questions if question.pixels is not None]
        flags = torch.tensor([question.pixels is not None for question in questions])
        image = torch.zeros_like(text)
        if pixels:
            image[flags] = self.encoder.image(torch.cat(pixels))
        return Keys(image, text, flags, {})


def decoded(question: Question, number: int = 1) -> Image.Image | None:
    """The upright RGB image of a question, None without one; UserError for one that cannot be read."""
    try:
        return Sample(f"question {number}", question.image, question.text, answer="").picture()
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"the image is not readable ({error}); expected PNG or JPEG.") from error


def _rounded(names: Sequence[str], row: Tensor) -> dict[str, float]:
    """A number [T] of each set by name; empty where there are none [0]."""
    return {name: round(value, 4) for name, value in zip(names, row.tolist(), strict=False)}
