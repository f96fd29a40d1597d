"""Questions to a frozen model with a pool of prompt sets: routed like test samples, answered in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.backbones.clip import KeyEncoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config import KeysConfig, MethodConfig, ModelConfig
from pipeline.data.collate import Examples, StageData, collate_prompts
from pipeline.data.sample import Sample, decode_image
from pipeline.data.shards import Keys
from pipeline.errors import UserError, nearest
from pipeline.evaluate import generate_answers
from pipeline.methods import make_method
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import NO_SET, similarity

BATCH = 16


@dataclass(frozen=True)
class Question:
    """One question about at most one image (encoded file bytes); `task` is for methods that have to be told it."""

    text: str
    image: bytes | None = None
    task: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was answered, with the inserted sets in the order of insertion and the similarity to every set."""

    text: str
    selected: list[str]
    similarity: dict[str, float]

    @property
    def sets(self) -> str:
        """The inserted sets for people, the most similar one first: `Count 0.70, Boxes 0.65`."""
        named = (f"{name} {self.similarity[name]:.2f}" for name in reversed(self.selected))
        return ", ".join(named) or "none"


@dataclass(frozen=True)
class Source:
    """What answering depends on: a run's or an adapter's pool and settings; names only what has been checked."""

    pool: PromptPool
    tasks: list[str]  # all tasks of the sequence; those of the pool come first
    method: MethodConfig
    model: ModelConfig
    keys: KeysConfig
    max_new_tokens: int
    projector: dict[str, Tensor] = field(default_factory=dict)

    def task_number(self, task: str | None) -> int:
        """Number of the named task; raises UserError for an unknown one, or for none where one is needed."""
        names, needed = self.tasks, make_method(self.method).needs_task
        if task is None:
            if needed:
                method = self.method
                what = method.name if method.name == "independent" else f"selection {method.selection}"
                raise UserError(
                    f"method {what} has to be told the task; say task (--task) with one of {', '.join(names)}."
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
    """Questions ready for the model: their samples, the sets they get [N, m] and their similarities [N, T]."""

    examples: Examples
    selected: Tensor
    similarity: Tensor


class SampleList(list[Sample]):
    """Samples in memory where a prepared split is expected."""

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(sample.question) + len(sample.answer) for sample in self], dtype=np.int64)


class Answerer:
    """A loaded model with a pool; raises UserError when model or CLIP cannot be loaded."""

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source = source
        self.method = make_method(source.method)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.lmm: LMM = load_lmm(source.model).to(device)
        if source.projector:
            self.lmm.load_projector(source.projector)
        self.encoder = KeyEncoder(*source.keys.source, device=device)

    @property
    def pool(self) -> PromptPool:
        return self.source.pool

    def answer(self, questions: Sequence[Question], max_new_tokens: int | None = None) -> list[Answer]:
        """Greedy answers in the order of the questions, at most `max_new_tokens` tokens each (None: as evaluated).

        Raises UserError for an image that cannot be read, a missing or unknown task, or a question that is too long.
        """
        if not questions:
            return []
        routed = self.route(questions)
        length = max_new_tokens or self.source.max_new_tokens
        texts = generate_answers(
            self.lmm, routed.examples, range(len(questions)), routed.selected, self.pool.prompts, length, BATCH,
            self.source.method.insertion,
        )  # fmt: skip
        return [
            Answer(texts[number], self.set_names(routed, number), self.similarities(routed, number))
            for number in range(len(questions))
        ]

    def ask(self, question: str, image: str | Path | bytes | None = None, task: str | None = None) -> Answer:
        """The answer to one question about an image (a file's path or its bytes), or about none; errors as `answer`."""
        encoded = image if isinstance(image, bytes) else read_image(image)
        return self.answer([Question(question, encoded, task)])[0]

    @torch.no_grad()
    def prompt_embeds(self, question: str, image: str | Path | bytes | None = None, task: str | None = None) -> Tensor:
        """What the decoder reads for a question [N, D]: words, image features and prompt sets in the model's precision.

        For servers that take `prompt_embeds` in place of text, such as vLLM with the same language model. Raises
        UserError as `answer`, and for architectures whose decoder needs more than these vectors.
        """
        if self.lmm.family.reads_places:
            raise UserError(
                f"The decoder of {self.lmm.family.kind} has to know which tokens are the image's, which prompt_embeds "
                "alone cannot say; expected another architecture, such as llava."
            )
        encoded = image if isinstance(image, bytes) else read_image(image)
        routed = self.route([Question(question, encoded, task)])
        batch = collate_prompts(routed.examples, [0], routed.selected).to(self.lmm.model.device)
        bank = self.pool.prompts.to(batch.input_ids.device, self.lmm.dtype)
        return embed_with_sets(self.lmm, batch, bank, self.source.method.insertion)[0][0].cpu()

    def route(self, questions: Sequence[Question]) -> Routed:
        """Find the sets of each question as for test samples; raises UserError as `answer`."""
        samples = SampleList(Sample(f"question {n + 1}", q.image, q.text, answer="") for n, q in enumerate(questions))
        numbers = [self.source.task_number(question.task) for question in questions]
        keys = self._keys(samples)
        weight = self.source.method.image_weight
        if len(self.pool):
            scores = similarity(keys.image, keys.text, self.pool.prototypes.cpu(), weight, keys.has_image)
        else:
            scores = torch.zeros(len(questions), 0)
        # A method is asked for the samples of one task at a time.
        rows: dict[int, Tensor] = {}
        for number in sorted(set(numbers)):
            mine = [place for place, other in enumerate(numbers) if other == number]
            chosen = self.method.answering_sets(self.pool, number, scores[mine], keys.has_image[mine])
            rows |= dict(zip(mine, chosen, strict=True))
        width = max(len(row) for row in rows.values())
        selected = torch.full((len(questions), width), NO_SET, dtype=torch.long)
        for place, row in rows.items():
            selected[place, : len(row)] = row
        return Routed(Examples(StageData([(samples, keys, None)]), self.lmm.conversation), selected, scores)

    def set_names(self, routed: Routed, number: int) -> list[str]:
        """Names of the sets of a routed question, in the order of insertion."""
        return [self.pool.names[index] for index in routed.selected[number].tolist() if index != NO_SET]

    def similarities(self, routed: Routed, number: int) -> dict[str, float]:
        """Similarity of a routed question to every set by name, rounded."""
        scores = routed.similarity[number].tolist()
        return {name: round(score, 4) for name, score in zip(self.pool.names, scores, strict=True)}

    def _keys(self, samples: SampleList) -> Keys:
        pictures = []
        for sample in samples:
            try:
                pictures.append(sample.picture())
            except Exception as error:  # Pillow raises many kinds for damaged files
                raise UserError(f"the image is not readable ({error}); expected PNG or JPEG.") from error
        text = self.encoder.text([sample.question for sample in samples])
        flags = torch.tensor([picture is not None for picture in pictures])
        image = torch.zeros_like(text)
        if flags.any():
            image[flags] = self.encoder.image([picture for picture in pictures if picture is not None])
        return Keys(image, text, flags, {})


def read_image(path: str | Path | None) -> bytes | None:
    """The bytes of an image file, None without a path; UserError when it cannot be read."""
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the image '{path}' cannot be read ({error.strerror}); expected an image file.") from error


def read_picture(path: str | Path | None, option: str = "") -> bytes | None:
    """The bytes of an image file that decodes, None without a path; UserError, after the `option`'s name, otherwise."""
    encoded = read_image(path)
    if encoded is not None:
        try:
            decode_image(encoded)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"{option}'{path}' is not a readable image ({error}); expected PNG or JPEG.") from error
    return encoded
