"""The exact speed-ups of prompt learning on CLIP: each against the plain path, with equal results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.bench import measure
from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.methods import make_learner
from pipeline.clip.search_space import SearchSpace, TowerOptions
from pipeline.clip.towers.backbone import Backbone
from pipeline.config.paths import PROJECT

TOKENIZER = "data_prep/nano/checkpoints/clip"  # gives names about as many tokens as any CLIP's tokenizer
OPTIONS = tuple(range(7))  # numbers of prompts per block, as published
WORDS = "red green blue yellow purple cyan orange circle square triangle cross ring large small digit letter".split()


@dataclass(frozen=True)
class ClipSize:
    """The towers of a CLIP: (width, blocks, heads) of text and vision, image side and patch."""

    text: tuple[int, int, int]
    vision: tuple[int, int, int]
    side: int
    patch: int
    joint: int


SIZES = {
    "nano": ClipSize((64, 2, 4), (128, 4, 4), 48, 8, 64),
    "small": ClipSize((256, 6, 4), (256, 6, 4), 96, 16, 256),
    "vitb16": ClipSize((512, 12, 8), (768, 12, 12), 224, 16, 512),
}


def random_backbone(size: ClipSize) -> Backbone:
    """A frozen CLIP with random weights, which costs as much as a trained one."""
    from transformers import CLIPConfig, CLIPModel

    def tower(sizes: tuple[int, int, int]) -> dict[str, int]:
        width, blocks, heads = sizes
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return dict(zip(names, (width, 4 * width, blocks, heads), strict=True))

    ids = {"vocab_size": 1024, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 77}
    config = CLIPConfig(
        text_config={**tower(size.text), **ids},
        vision_config={**tower(size.vision), "image_size": size.side, "patch_size": size.patch},
        projection_dim=size.joint,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone(CLIPModel(config))


class Subject:
    """One method on a random backbone, with a training batch and images to classify."""

    def __init__(self, size: ClipSize, classes: int, images: int, device: str) -> None:
        from transformers import AutoTokenizer

        self.backbone = random_backbone(size).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(PROJECT / TOKENIZER)
        self.names = [f"{WORDS[k % len(WORDS)]} {WORDS[k // len(WORDS) % len(WORDS)]} {k}" for k in range(classes)]
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(images, 3, size.side, size.side, generator=generator).to(device)
        self.labels = torch.randint(classes, (images,), generator=generator).to(device)

    def classifier(self, method: str, chunk: int | None = None, shorten: bool = True, **options: Any) -> PromptedCLIP:
        """The method, with the same initial values on every path."""
        words = self.backbone.words(self.tokenizer, shorten)
        learner = make_learner(method, self.backbone, words, seed=1, **options).to(self.pixels.device)
        return PromptedCLIP(self.backbone, learner, words, self.names, text_chunk=chunk)

    def search(self, plain: bool = False, shorten: bool = True) -> PromptedCLIP:
        """A search of dpl among the published options, with the same initial values on every path."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            space = SearchSpace(self.backbone.sizes, TowerOptions(OPTIONS, OPTIONS), plain=plain)
        words = self.backbone.words(self.tokenizer, shorten)
        return PromptedCLIP(self.backbone, space.to(self.pixels.device), words, self.names)

    def step(self, module: PromptedCLIP, features: Tensor | None = None) -> Callable[[], Tensor]:
        """A call that computes the gradients of one batch."""
        batch = ImageBatch(None if features is not None else self.pixels, self.labels, image_features=features)

        def call() -> Tensor:
            module.zero_grad()
            loss, _ = module(batch)
            loss.backward()
            return loss.detach()

        return call


@torch.no_grad()
def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def bench_clip(
    size_name: str = "small",
    classes: int = 100,
    images: int = 8,
    rounds: int = 3,
    chunk: int = 25,
    batches: int = 4,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure each speed-up against the plain path.

    `difference` is the largest between the two paths' cosine similarities, or losses divided by the scale.
    """
    subject = Subject(SIZES[size_name], classes, images, device)
    variants: dict[str, Any] = {}
    ratios: dict[str, dict[str, float]] = {}

    def pair(title: str, plain: Any, fast: Any, samples: int, difference: float) -> None:
        calls = {f"{title}, plain": (plain, samples, dict), f"{title}, fast": (fast, samples, dict)}
        slow, quick = measure.compare(calls, rounds, device).values()
        variants.update({found.name: found.to_json(None) for found in (slow, quick)})
        ratios[title] = measure.ratio(slow, quick) | {"difference": difference}

    def gradients(title: str, plain: PromptedCLIP, fast: PromptedCLIP, features: Tensor | None = None) -> None:
        first, second = subject.step(plain), subject.step(fast, features)
        scale = float(subject.backbone.scale)
        pair(title, first, second, images, _difference(first(), second()) / scale)

    gradients("texts end at their last token", subject.classifier("coop", shorten=False), subject.classifier("coop"))
    with torch.no_grad():
        features = subject.classifier("coop").image_features(subject.pixels)
    gradients("image features kept (coop)", subject.classifier("coop"), subject.classifier("coop"), features)
    gradients("classes in chunks", subject.classifier("coop"), subject.classifier("coop", chunk))
    gradients("one attention for all options (dpl's search)", subject.search(plain=True), subject.search())
    gradients("texts end at their last token (dpl's search)", subject.search(shorten=False), subject.search())
    module = subject.classifier("maple", length=2, depth=2)
    module.requires_grad_(False)  # otherwise the counter of operations would record a backward pass

    @torch.no_grad()
    def evaluate(kept: bool) -> Tensor:
        texts = module.text_features() if kept else None
        found = [module.logits(subject.pixels, text_features=texts) for _ in range(batches)]
        return torch.cat(found) / subject.backbone.scale

    difference = _difference(evaluate(False), evaluate(True))
    title = "text features kept in evaluation"
    pair(title, lambda: evaluate(False), lambda: evaluate(True), images * batches, difference)
    return {
        "size": size_name,
        "classes": classes,
        "images": images,
        "chunk": chunk,
        "batches": batches,
        "machine": measure.machine(device),
        "variants": variants,
        "ratios": {"the plain path": ratios},
    }
