"""Answers questions with a frozen model and a prompt pool: routed like test samples, decoded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.adapter.answer import Answer, Chosen
from pipeline.adapter.choosing import Chooser, Question, Routable, decoded
from pipeline.adapter.source import Source
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.example import Example
from pipeline.data.sample import Sample, decode_image
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.prompts import routing
from pipeline.prompts.answer_head import AnswerHeads, has_heads, require_fitting_heads
from pipeline.prompts.embedding import embed_with_rows
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.projector import load_projector
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.devices import choose_device

BATCH = 16
TOGETHER = 256  # most questions whose pixels are in memory at once


@dataclass(frozen=True)
class Tokenised(Routable):
    """A tokenised question without the image's file."""

    example: Example = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return super().nbytes + self.example.nbytes


@dataclass(frozen=True)
class Routed(routing.Routed):
    """Routed questions with their samples."""

    examples: Examples = field(kw_only=True)


class Answerer:
    """A loaded model with a pool; raises UserError when model or CLIP cannot be loaded."""

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source = source
        place = choose_device(device)
        self.lmm: LMM = load_lmm(source.model, device=place)
        self.lmm.use_repetition_penalty(source.repetition_penalty)
        load_projector(self.lmm, source.pool.shared)
        self.chooser = Chooser(source, place)
        self.method, self.encoder = self.chooser.method, self.chooser.encoder
        vocabulary = int(self.lmm.model.get_output_embeddings().out_features)
        require_fitting_heads(source.pool.states, source.pool.names, vocabulary, self.encoder.width)
        self.entry = entry_of(self.method)

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
        return self._generated(self.route(questions), max_new_tokens or self.source.max_new_tokens)

    def _generated(self, routed: Routed, max_new_tokens: int) -> list[Answer]:
        """The answers to routed questions with the modules of their selection."""
        number = len(routed.selection)
        heads = AnswerHeads(self.pool.states, routed.examples.data.keys, routed.selection)
        texts = generate_answers(
            self.lmm,
            routed.examples,
            range(number),
            Modules(self.pool.tensors, routed.selection, self.entry, self.pool.common, heads.weighing),
            Decoding(max_new_tokens, BATCH),
        )
        return [Answer(text=texts[place], **vars(self.chosen(routed, place))) for place in range(number)]

    def answer_told(self, question: Question, task: str) -> Answer:
        """The answer with the sets that the question would get if the set of `task` ranked first (`Routing.told`).

        `Answer.similarity` is the router's, which is not changed. Raises UserError as `answer` does, for a task without
        a set, and where sets are not chosen by comparing the tasks.
        """
        routing = self.method.routing
        if not routing.can_be_told:
            raise UserError(
                f"method {self.method.title} does not choose sets by comparing the tasks; expected no task by hand."
            )
        if task not in self.pool.names:
            known = ", ".join(self.pool.names)
            raise UserError(f"there is no prompt set of '{task}'; expected one of {known}.")
        routed = self.route([question])
        pictured = torch.tensor([question.image is not None])
        selection = routing.told(routed, self.pool.states, self.pool.names.index(task), pictured)
        return self._generated(replace(routed, selection=selection), self.source.max_new_tokens)[0]

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
        if has_heads(self.pool.states):
            raise UserError(
                "These modules have answer heads (method.answer_head), which weigh the tokens of an answer, and a "
                "server that gets prompt_embeds decodes without them; expected method.answer_head none."
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
        picture = decoded(question, number) if picture is None else picture
        example = self.lmm.conversation.example_of(sample, picture)
        pixels = self.chooser.pixels(picture)
        text = self.lmm.conversation.bare(question.text)  # which is answered, so it routes too
        return Tokenised(text, task, pixels, question.unfamiliar, example=example)

    def require_fitting(self, question: Question, size: tuple[int, int]) -> None:
        """Raise UserError where a question with an image of this size has too many tokens.

        `tokenise` raises the same, but only after it has computed the pixels: hundreds of megabytes for some models.
        """
        conversation, sample = self.lmm.conversation, Sample("question 1", None, question.text, answer="")
        if conversation.cuts:
            return
        # The image's orientation (EXIF) is not known before it is decoded. Most models take as many tokens either way.
        sides = {conversation.image_shape(*each): each for each in (size, size[::-1])}
        fewest = min(conversation.length(sample, each).all for each in sides.values())
        if fewest > conversation.max_length:
            raise conversation.too_long(sample.id, fewest)

    def route(self, questions: Sequence[Question | Tokenised]) -> Routed:
        """Select the modules of each question as for test samples; raises UserError as `answer` does."""
        tokenised = [
            question if isinstance(question, Tokenised) else self.tokenise(question, number)
            for number, question in enumerate(questions, start=1)
        ]
        keys = self.chooser.keys(tokenised)
        found = self.chooser.route(tokenised, keys)
        examples = [question.example for question in tokenised]
        samples = SampleList(Sample(e.id, None, q.text, "") for e, q in zip(examples, tokenised, strict=True))
        data = StageData([(samples, keys, None)])
        ready = Examples(data, self.lmm.conversation, ready=examples)
        return Routed(**vars(found), examples=ready)

    def chosen(self, routed: Routed, number: int) -> Chosen:
        """How a routed question came to its sets, in names and rounded numbers."""
        return self.chooser.chosen(routed, number)


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
