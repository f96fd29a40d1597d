"""Models and samples of any size with random weights; nothing is downloaded, since speed depends on shapes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import DTYPES, LMM
from pipeline.data.collate import Batch

IMAGE_TOKEN = 3
FIRST_WORD = 4  # below it are special tokens


@dataclass(frozen=True)
class Size:
    """Sizes of a LLaVA with its CLIP, and of a typical sample of CoIN with three inserted sets of 10 vectors."""

    width: int
    inner: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    key_width: int
    vocabulary: int = 32_000
    image_side: int = 336
    patch: int = 14
    system_tokens: int = 34  # between the first token and the image, in LLaVA-1.5's conversation
    question_tokens: int = 39
    answer_tokens: int = 12
    prompt_length: int = 10
    k: int = 3

    @property
    def image_tokens(self) -> int:
        """Features of one image."""
        return (self.image_side // self.patch) ** 2


SIZES = {
    "tiny": Size(
        64,
        172,
        2,
        4,
        32,
        2,
        2,
        32,
        2,
        32,
        vocabulary=512,
        image_side=56,
        system_tokens=6,
        question_tokens=8,
        answer_tokens=4,
        prompt_length=4,
    ),
    "small": Size(512, 1376, 8, 8, 128, 4, 2, 96, 4, 96),
    "base": Size(768, 2048, 12, 12, 256, 8, 4, 192, 6, 192),
    "1b": Size(2048, 5632, 22, 32, 1024, 24, 16, 768, 12, 768),
    "7b": Size(4096, 11008, 32, 32, 1024, 24, 16, 768, 12, 768),
}


class _Words:
    """A stand-in for a processor: measurements use token ids directly, so only the end token is read."""

    eos_token_id, pad_token_id, all_special_ids = 2, 0, (0, 1, 2)

    @property
    def tokenizer(self) -> _Words:
        """Itself."""
        return self


def make_lmm(size: Size, device: str = "cpu", dtype: str = "float32", layers: int | None = None, seed: int = 0) -> LMM:
    """A LLaVA of this size with random weights; `layers` overrides its number of decoder layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_side,
        patch_size=size.patch,
        projection_dim=size.key_width,
    )
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=size.image_tokens,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(DTYPES[dtype])
        try:
            model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    return LMM(model, _Words())


def make_batch(
    size: Size, samples: int, per_image: int = 1, selected: int | None = None, seed: int = 0, answers: bool = True
) -> Batch:
    """A batch on the CPU: `per_image` consecutive samples share an image, `selected` earlier sets exist.

    In training a sample gets k - 1 of these and then the stage's own set; for answering it gets k.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(FIRST_WORD, size.vocabulary, shape, generator=generator)

    images = -(-samples // per_image)
    image = torch.arange(samples) // per_image
    answer = words(samples, size.answer_tokens if answers else 0)
    input_ids = torch.cat(
        [
            torch.ones(samples, 1, dtype=torch.long),
            words(1, size.system_tokens).expand(samples, -1),
            torch.full((samples, size.image_tokens), IMAGE_TOKEN),
            words(samples, size.question_tokens),
            answer,
        ],
        dim=1,
    )
    labels = torch.full_like(input_ids, -100)
    labels[:, input_ids.shape[1] - answer.shape[1] :] = answer
    chosen = torch.zeros(samples, 0, dtype=torch.long)
    if selected:
        order = torch.rand(samples, selected, generator=generator).argsort(dim=1)
        chosen = order[:, : size.k - answers]
    return Batch(
        input_ids=input_ids,
        attention=torch.ones_like(input_ids),
        labels=labels,
        images={"pixel_values": torch.randn(images, 3, size.image_side, size.image_side, generator=generator)},
        has_image=torch.ones(samples, dtype=torch.bool),
        weights=torch.ones(samples),
        selected=chosen,
        image_key=torch.randn(images, size.key_width, generator=generator)[image],
        text_key=torch.randn(samples, size.key_width, generator=generator),
        ids=[str(number) for number in range(samples)],
        places=torch.arange(samples),
        groups=image,
        leaders=torch.arange(images) * per_image,
    )


def every_image(batch: Batch) -> Batch:
    """The same samples, each with a separate copy of its image."""
    assert batch.groups is not None
    images: dict[str, Any] = {name: value[batch.groups] for name, value in batch.images.items()}
    from dataclasses import replace

    return replace(batch, images=images, groups=None, leaders=None)
