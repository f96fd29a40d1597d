"""Adapters on tiny random models, made without training: every set is found by the picture and question of its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pipeline.adapter.answering import Question
from pipeline.adapter.format import Adapter, write_adapter
from pipeline.adapter.meta import FORMAT_VERSION, Meta
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.backbones.key_encoders import key_encoder
from pipeline.config.method import method_options
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.data.keys import Keys
from pipeline.data.sample import decode_image
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool
from tests import tiny, tiny_clip

LENGTH = 3  # vectors per set
COLOURS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 10))


@dataclass(frozen=True)
class Models:
    """Folders of the frozen models, and the width of the multimodal one."""

    llava: Path
    clip: Path
    width: int = tiny.HIDDEN


def save_models(folder: Path) -> Models:
    """Write a tiny LLaVA and a tiny CLIP."""
    return Models(tiny.save_llava(folder / "llava", tied=True), tiny_clip.save_clip(folder / "clip"))


def question(number: int, variant: int = 0, with_image: bool = True) -> Question:
    """A question of task `number`; variants differ in length."""
    image = tiny.png(COLOURS[number]) if with_image else None
    return Question(f"task {'abcd'[number] * 6} asks{'?' * (1 + variant)}", image)


def foreign(with_image: bool = True) -> Question:
    """A question that resembles no task, in neither picture nor words."""
    return Question("ZZZZZZZ", tiny.png((0, 0, 0)) if with_image else None)


Asks: TypeAlias = Callable[..., Question]  # as `question`, by number, variant and whether there is an image


def training_keys(encoder: KeyEncoder, number: int, asks: Asks = question) -> Keys:
    """The routing keys of twelve samples of a task, some of them without an image."""
    asked = [asks(number, variant, with_image=variant % 4 > 0) for variant in range(12)]
    pictured = torch.tensor([one.image is not None for one in asked])
    text = encoder.text([one.text for one in asked])
    image = torch.zeros_like(text)
    image[pictured] = encoder.image([decode_image(one.image) for one in asked if one.image is not None])
    return Keys(image, text, pictured, {})


def save_adapter(
    folder: Path, models: Models, numbers: tuple[int, ...] = (0, 1, 2), asks: Asks = question, **method: Any
) -> Path:
    """Write an adapter with the sets of these tasks, named T0, T1, ...; a set is the same in every adapter."""
    model, clip = ModelConfig(path=str(models.llava), max_length=256), KeysConfig(path=str(models.clip))
    encoder = key_encoder(*clip.source)
    options = method_options(**{"prompt_length": LENGTH, "k": 2, "router": "prototype", "gate": 0.001, **method})
    pool = PromptPool()
    for number in numbers:
        asked = asks(number)
        assert asked.image is not None
        keys = (encoder.image([decode_image(asked.image)]), encoder.text([asked.text]))
        prototype = sum(torch.nn.functional.normalize(key, dim=-1) for key in keys)
        assert isinstance(prototype, torch.Tensor)
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randn(LENGTH, models.width, generator=generator)
        routing = make_method(options).routing
        state = routing.observe(training_keys(encoder, number, asks), {"prototype": prototype[0]})
        if routing.router is not None and not routing.router.learned:
            state = routing.observe(training_keys(encoder, number, asks))
        pool.append(f"T{number}", {"prompt": prompt}, state)
    meta = Meta(
        format=FORMAT_VERSION,
        sets=pool.names,
        tasks=pool.names,
        recipe="tiny",
        method=options,
        model=model,
        clip=clip,
        base_model=base_fingerprint(model),
        keys=key_identity(*clip.source),
        max_new_tokens=6,
        scores={name: 50.0 for name in pool.names},
        metrics={"last": 50.0},
    )
    write_adapter(Adapter(meta, pool), folder)
    return folder
