"""Whether an exported checkpoint reads conversations as the run does, said before its weights are written.

A chat template can only say where sets stand in a text, and tokenizers and processors differ in what they make of it.
So a few questions are tokenised by both, with and without sets and an image, and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.adapter.vocabulary.settings import conversation_of
from pipeline.adapter.vocabulary.tokens import Added, Probe
from pipeline.backbones.families.base import LMMFamily
from pipeline.backbones.lmm_processor import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.prompts.insertion import insertion_place

QUESTIONS = (
    "what is this?",
    "9 of them?",
    "\N{LATIN SMALL LETTER E WITH ACUTE}t\N{CJK UNIFIED IDEOGRAPH-4F60}",
    "a\nb",
)
SIZES = ((60, 40), (33, 90), (1300, 900))  # of images, the last one above what most limits allow


@dataclass(frozen=True)
class Run:
    """How a run reads questions."""

    conversation: Conversation
    family: type[LMMFamily]
    model: ModelConfig
    insertion: str


def prove(run: Run, folder: Path, tokens: Added) -> None:
    """Compare the checkpoint in `folder`, which needs no weights yet, with the run; UserError where they differ."""
    processor = load_processor(run.model.model_copy(update={"path": str(folder), "revision": None, **_AS_IT_IS}))
    exported = conversation_of(processor, run.model.model_copy(update=_AS_IT_IS))
    probes = tokens.probes()
    pictures = [None, *(_noise(width, height) for width, height in SIZES)]
    for number, picture in enumerate(pictures):
        for question in QUESTIONS if number < 2 else QUESTIONS[:1]:
            inputs = run.conversation.example_of(Sample("probe", None, question, ""), picture)
            for probe in probes if question == QUESTIONS[0] else probes[-1:]:
                found = _read(processor, question, picture, probe)
                expected = _inserted(run, inputs.prompt, probe.ids)
                _require_equal(run, question, picture, expected, found["input_ids"][0].tolist())
        if picture is not None:
            _require_pixels(run, inputs.images or {}, exported, picture)
    _require_out_of_reach(processor, tokens)


_AS_IT_IS = {"template": "auto", "image_tokens": None, "image_padding": "none"}


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _read(processor: Any, question: str, picture: Image.Image | None, probe: Probe) -> Any:
    """What the checkpoint's own processor makes of a question."""
    image = [] if picture is None else [{"type": "image", "image": picture}]
    messages = [*probe.messages, {"role": "user", "content": [*image, {"type": "text", "text": question}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options, **probe.arguments)


def _inserted(run: Run, prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The run's tokens with those of the sets where it has their vectors."""
    tokens = torch.tensor([list(prompt)])
    spans = run.family.image_spans(tokens == run.conversation.image_number)
    place = int(insertion_place(torch.ones_like(tokens), spans, run.insertion))
    return [*prompt[:place], *ids, *prompt[place:]]


def _require_equal(
    run: Run, question: str, picture: Image.Image | None, expected: Sequence[int], found: Sequence[int]
) -> None:
    if list(expected) == list(found):
        return
    place = next((n for n, (one, two) in enumerate(zip(expected, found, strict=False)) if one != two), len(found))
    what = "a question" if picture is None else "a question with an image"
    raise UserError(
        f"A chat template of '{run.model.path}' cannot put prompt sets where the run has them ({run.insertion}): of "
        f"{what} ({question!r}) it makes {len(found)} tokens, the run {len(expected)}, and number {place + 1} is the "
        "first to differ; expected a run with another method.insertion, or `export` as an adapter."
    )


def _require_pixels(run: Run, images: dict[str, Any], exported: Conversation, picture: Image.Image) -> None:
    """Raise UserError unless image tensors are those of the run."""
    found = exported.example_of(Sample("probe", None, QUESTIONS[0], ""), picture).images or {}
    for name, value in images.items():
        if name not in found or found[name].shape != value.shape or not torch.equal(found[name], value):
            raise UserError(
                f"The image processor of '{run.model.path}' has no setting with which it prepares images as the run "
                f"does ({name} differs); expected a run without model.image_tokens and model.image_padding, or "
                "`export` as an adapter."
            )


def _require_out_of_reach(processor: Any, tokens: Added) -> None:
    """Raise UserError if a message could hold a set's token."""
    written = "".join(tokens.texts()[:2])
    found = _read(processor, written, None, tokens.probes()[0])["input_ids"][0].tolist()
    if any(tokens.first <= token < tokens.end for token in found):
        raise UserError(
            "The chat template of the exported checkpoint lets a message hold the tokens of prompt sets, which is a "
            "fault of `export`; please report it with the model's name."
        )
