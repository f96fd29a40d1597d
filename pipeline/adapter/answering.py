"""Answers questions with a frozen model and a prompt pool: routed like test samples, decoded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipeline.backbones.clip import KeyEncoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import MethodOptions
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.example import Example
from pipeline.data.keys import Keys
from pipeline.data.pictures import read_header
from pipeline.data.sample import Sample, decode_image
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError, nearest
from pipeline.methods import make_method
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.projector import load_projector
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.devices import choose_device

BATCH = 16
TOGETHER = 256  # most questions whose pixels are in memory at once


@dataclass(frozen=True)
class Question:
    """One question about at most one image (the file's bytes); `task` is for methods that need the task."""

    text: str
    image: bytes | None = None
    task: str | None = None


@dataclass(frozen=True)
class Tokenised:
    """A tokenised question without the image's file; `pixels` [1, 3, H, W] are the input of CLIP."""

    text: str
    task: int  # number of the task
    example: Example
    pixels: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self.text) + self.example.nbytes + (0 if self.pixels is None else self.pixels.nbytes)


@dataclass(frozen=True)
class Answer:
    """An answer, with the inserted sets in the order of insertion and the similarity to every set."""

    text: str
    selected: list[str]
    similarity: dict[str, float]
    weights: dict[str, float] | None = None  # of the inserted sets; None: each has weight 1

    @property
    def sets(self) -> str:
        """The inserted sets in words, the most similar one first: `Count 0.70, Boxes 0.65`."""
        known = {name: f" {score:.2f}" for name, score in self.similarity.items()}
        return ", ".join(f"{name}{known.get(name, '')}" for name in reversed(self.selected)) or "none"


@dataclass(frozen=True)
class Source:
    """The validated pool and settings of a run or an adapter, as `Answerer` needs them."""

    pool: PromptPool
    tasks: list[str]  # all tasks of the sequence; those of the pool come first
    method: MethodOptions
    model: ModelConfig
    keys: KeysConfig
    max_new_tokens: int
    repetition_penalty: float | str = "checkpoint"  # as `evaluate.repetition_penalty` of the run

    def task_number(self, task: str | None) -> int:
        """Number of the named task; raises UserError for an unknown task, or where the method needs one."""
        names, method = self.tasks, make_method(self.method)
        needed = method.needs_task
        if task is None:
            if needed:
                raise UserError(
                    f"method {method.title} needs the task; set task (--task) to one of {', '.join(names)}."
                )
            return 0
        if task not in names:
            raise UserError(f"unknown task '{task}'; expected one of {', '.join(names)}.{nearest(task, names)}")
        number = names.index(task)
        if needed and number >= len(self.pool):
            known = ", ".join(self.pool.names)
            raise UserError(f"task '{task}' has no finished stage yet; expected one of {known}.")
        return number


@dataclass(frozen=True)
class Routed:
    """Routed questions: their samples, selected modules, and the router's scores for every task."""

    examples: Examples
    selection: Selection
    similarity: Tensor  # [N, T]; [N, 0] of a method without a router


class SampleList(list[Sample]):
    """Samples in memory with the interface of a prepared split."""

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(sample.question) + len(sample.answer) for sample in self], dtype=np.int64)

    @property
    def question_chars(self) -> npt.NDArray[np.int32]:
        return np.array([len(sample.question) for sample in self], dtype=np.int32)

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        headers = [None if sample.image is None else read_header(sample.image) for sample in self]
        sizes = [(0, 0) if header is None else (header.width, header.height) for header in headers]
        return np.array(sizes, dtype=np.int32).reshape(-1, 2)

    def text(self, index: int) -> Sample:
        return replace(self[index], image=None)


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
        self.encoder = KeyEncoder(*source.keys.source, device=place)

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
            Modules(self.pool.tensors, routed.selection, self.entry),
            Decoding(length, BATCH),
        )
        return [
            Answer(
                texts[number],
                self.set_names(routed, number),
                self.similarities(routed, number),
                self.weights(routed, number),
            )
            for number in range(len(questions))
        ]

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
        bank = self.pool.prompts.to(batch.input_ids.device, self.lmm.dtype)
        return embed_with_sets(self.lmm, batch, bank, self.method.insertion)[0][0].cpu()

    def tokenise(self, question: Question, number: int = 1, picture: Image.Image | None = None) -> Tokenised:
        """Decode and tokenise a question; runs no model and is thread-safe. Raises UserError as `answer` does.

        `number` is the question's number for messages, `picture` its image if it has been decoded already.
        """
        task = self.source.task_number(question.task)
        sample = Sample(f"question {number}", question.image, question.text, answer="")
        try:
            picture = sample.picture() if picture is None else picture
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"the image is not readable ({error}); expected PNG or JPEG.") from error
        example = self.lmm.conversation.example_of(sample, picture)
        return Tokenised(question.text, task, example, None if picture is None else self.encoder.pixels([picture]))

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
        scores = routing.scores(keys, self.pool.states)
        selection = routing.inference(scores, tasks, keys.has_image)
        examples = [question.example for question in tokenised]
        samples = SampleList(Sample(e.id, None, q.text, "") for e, q in zip(examples, tokenised, strict=True))
        data = StageData([(samples, keys, None)])
        return Routed(Examples(data, self.lmm.conversation, ready=examples), selection, routing.shown(scores))

    def set_names(self, routed: Routed, number: int) -> list[str]:
        """Names of the sets of a routed question, in the order of insertion."""
        return [self.pool.names[index] for index, _ in routed.selection.chosen(number)]

    def similarities(self, routed: Routed, number: int) -> dict[str, float]:
        """The router's scores of a routed question by set, rounded; empty without a router."""
        scores = routed.similarity[number].tolist()
        return {name: round(score, 4) for name, score in zip(self.pool.names, scores, strict=False)}

    def weights(self, routed: Routed, number: int) -> dict[str, float] | None:
        """The weights of a routed question's sets by name, rounded; None where each has weight 1."""
        if routed.selection.weights is None:
            return None
        return {self.pool.names[index]: round(weight, 4) for index, weight in routed.selection.chosen(number)}

    def _keys(self, questions: Sequence[Tokenised]) -> Keys:
        text = self.encoder.text([question.text for question in questions])
        pixels = [question.pixels for question in questions if question.pixels is not None]
        flags = torch.tensor([question.pixels is not None for question in questions])
        image = torch.zeros_like(text)
        if pixels:
            image[flags] = self.encoder.image(torch.cat(pixels))
        return Keys(image, text, flags, {})


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
