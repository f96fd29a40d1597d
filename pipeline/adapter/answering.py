"""Answers questions with a frozen model and a prompt pool: routed like test samples, decoded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.adapter.answer import Answer, Chosen
from pipeline.adapter.source import Source
from pipeline.backbones.key_encoders import key_encoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import Unfamiliar
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.example import Example
from pipeline.data.keys import Keys
from pipeline.data.sample import Sample, decode_image
from pipeline.data.sample_list import SampleList
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.embedding import embed_with_rows
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.projector import load_projector
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.devices import choose_device

BATCH = 16
TOGETHER = 256  # most questions whose pixels are in memory at once


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
class Tokenised:
    """A tokenised question without the image's file; `pixels` [1, 3, H, W] are the input of CLIP."""

    text: str
    task: int  # number of the task
    example: Example
    pixels: Tensor | None
    unfamiliar: Unfamiliar | None = None  # as of the question

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self.text) + self.example.nbytes + (0 if self.pixels is None else self.pixels.nbytes)


@dataclass(frozen=True)
class Routed:
    """Routed questions: their samples, selected modules, and the router's scores for every task."""

    examples: Examples
    selection: Selection
    similarity: Tensor  # [N, T]; [N, 0] of a method without a router
    probabilities: Tensor | None = None  # [N, T]; None where no routing keys are kept to calibrate the scores with
    unfamiliar: Tensor | None = None  # [N] bool, whether a question resembles no task


class Answerer:
    """A loaded model with a pool; raises UserError when model or CLIP cannot be loaded."""

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source = source
        self.method = make_method(source.method)
        place = choose_device(device)
        self.lmm: LMM = load_lmm(source.model, device=place)
        self.lmm.use_repetition_penalty(source.repetition_penalty)
        load_projector(self.lmm, source.pool.shared)
        self.entry = entry_of(self.method)
        self.encoder = key_encoder(*source.keys.source, device=place)
        if self.method.routing.keeps_keys:
            self.method.routing.fitted(source.pool.states)  # now, so that the first question does not wait for it

    @property
    def pool(self) -> PromptPool:
        return self.source.pool

    def answer(self, questions: Sequence[Question], max_new_tokens: int | None = None) -> list[Answer]:
        """Greedy answers in the order of the questions, of at most `max_new_tokens` tokens (None: as in evaluation).

        Raises UserError for an image that cannot be read, a missing or unknown task, or a question that is too long.
        """
        return [
            answer
            for start in range(0, len(questions), TOGETHER)
            for answer in self._answer(questions[start : start + TOGETHER], max_new_tokens)
        ]

    def _answer(self, questions: Sequence[Question], max_new_tokens: int | None) -> list[Answer]:
        routed = self.route(questions)
        length = max_new_tokens or self.source.max_new_tokens
        texts = generate_answers(
            self.lmm,
            routed.examples,
            range(len(questions)),
            Modules(self.pool.tensors, routed.selection, self.entry, self.pool.common),
            Decoding(length, BATCH),
        )
        return [Answer(text=texts[number], **vars(self.chosen(routed, number))) for number in range(len(questions))]

    def ask(self, question: str, image: str | Path | bytes | None = None, task: str | None = None) -> Answer:
        """The answer to one question, with an image (path or bytes of a file) or without; errors as for `answer`."""
        return self.answer([Question(question, image if isinstance(image, bytes) else read_image(image), task)])[0]

    @torch.no_grad()
    def prompt_embeds(self, question: str, image: str | Path | bytes | None = None, task: str | None = None) -> Tensor:
        """Input embeddings [N, D] of a question: words, image features and prompt sets in the model's precision.

        For servers that accept `prompt_embeds` in place of text, such as vLLM with the same language model. Raises
        UserError as `answer` does, and for architectures whose decoder needs further inputs.
        """
        kind = self.lmm.family.kind
        if self.lmm.family.needs_image_mask or self.entry.attaches:
            needs = "which tokens are the image's" if self.lmm.family.needs_image_mask else "the updates of its layers"
            raise UserError(
                f"The decoder of {kind} needs to know {needs}, which prompt_embeds cannot express; expected another "
                "architecture, such as llava, and prompt sets."
            )
        routed = self.route([Question(question, image if isinstance(image, bytes) else read_image(image), task)])
        batch = collate_prompts(routed.examples, [0], routed.selection).to(self.lmm.model.device)
        device, dtype = batch.input_ids.device, self.lmm.dtype
        tensors = {name: value.to(device, dtype) for name, value in self.pool.tensors.items()}
        rows = self.entry.rows(tensors, batch)
        return embed_with_rows(self.lmm, batch, rows, self.method.insertion).vectors[0].cpu()

    def tokenise(self, question: Question, number: int = 1, picture: Image.Image | None = None) -> Tokenised:
        """Decode and tokenise a question; runs no model and is thread-safe. Raises UserError as `answer` does.

        `number` is the question's number for messages, `picture` its image if it has been decoded already.
        """
        task = self.source.task_number(question.task)
        self.source.require_sight(question.unfamiliar)
        sample = Sample(f"question {number}", question.image, question.text, answer="")
        try:
            picture = sample.picture() if picture is None else picture
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"the image is not readable ({error}); expected PNG or JPEG.") from error
        example = self.lmm.conversation.example_of(sample, picture)
        pixels = None if picture is None else self.encoder.pixels([picture])
        return Tokenised(question.text, task, example, pixels, question.unfamiliar)

    def require_fitting(self, question: Question, size: tuple[int, int]) -> None:
        """Raise UserError where a question with an image of this size has too many tokens.

        `tokenise` raises the same, but only after it has computed the pixels: hundreds of megabytes for some models.
        """
        conversation, sample = self.lmm.conversation, Sample("question 1", None, question.text, answer="")
        if conversation.cuts:
            return
        # The image's orientation (EXIF) is not known before it is decoded.
        fewest = min(conversation.length(sample, sides).all for sides in (size, size[::-1]))
        if fewest > conversation.max_length:
            raise conversation.too_long(sample.id, fewest)

    def route(self, questions: Sequence[Question | Tokenised]) -> Routed:
        """Select the modules of each question as for test samples; raises UserError as `answer` does."""
        tokenised = [
            question if isinstance(question, Tokenised) else self.tokenise(question, number)
            for number, question in enumerate(questions, start=1)
        ]
        tasks = torch.tensor([question.task for question in tokenised], dtype=torch.long)
        keys, routing = self._keys(tokenised), self.method.routing
        bare = torch.tensor([(one.unfamiliar or routing.unfamiliar) == "zero_shot" for one in tokenised])
        found = routing.route(keys, self.pool.states, tasks, bare=bare)
        examples = [question.example for question in tokenised]
        samples = SampleList(Sample(e.id, None, q.text, "") for e, q in zip(examples, tokenised, strict=True))
        data = StageData([(samples, keys, None)])
        ready = Examples(data, self.lmm.conversation, ready=examples)
        return Routed(ready, found.selection, found.scores, found.probabilities, found.unfamiliar)

    def chosen(self, routed: Routed, number: int) -> Chosen:
        """How a routed question came to its sets, in names and rounded numbers."""
        names, picked = self.pool.names, routed.selection.chosen(number)
        strange = None if routed.unfamiliar is None else bool(routed.unfamiliar[number])
        return Chosen(
            [names[index] for index, _ in picked],
            _rounded(names, routed.similarity[number]),
            None if routed.selection.weights is None else {names[index]: round(weight, 4) for index, weight in picked},
            None if routed.probabilities is None else _rounded(names, routed.probabilities[number]),
            strange,
        )

    def _keys(self, questions: Sequence[Tokenised]) -> Keys:
        text = self.encoder.text([question.text for question in questions])
        pixels = [question.pixels for question in questions if question.pixels is not None]
        flags = torch.tensor([question.pixels is not None for question in questions])
        image = torch.zeros_like(text)
        if pixels:
            image[flags] = self.encoder.image(torch.cat(pixels))
        return Keys(image, text, flags, {})


def _rounded(names: Sequence[str], row: Tensor) -> dict[str, float]:
    """A number [T] of each set by name; empty where there are none [0]."""
    return {name: round(value, 4) for name, value in zip(names, row.tolist(), strict=False)}


def read_image(path: str | Path | None) -> bytes | None:
    """The bytes of an image file, None without a path; UserError when it cannot be read."""
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the image '{path}' cannot be read ({error.strerror}); expected an image file.") from error


def read_picture(path: str | Path | None, option: str = "") -> bytes | None:
    """The bytes of a decodable image file, None without a path; the UserError begins with `option`."""
    encoded = read_image(path)
    if encoded is not None:
        try:
            decode_image(encoded)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"{option}'{path}' is not a readable image ({error}); expected PNG or JPEG.") from error
    return encoded
