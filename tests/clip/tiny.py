"""Tiny random CLIP and SigLIP models and a tokenizer of bytes, for tests of prompts in their towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.methods import make_learner
from pipeline.clip.towers.backbone import Backbone

CONTEXT = 77
START, END = 256, 257


def byte_tokenizer(context: int = CONTEXT) -> Any:
    """Bytes of the lower-cased text as ids 0 to 255, between a start (256) and an end token (257); padding is 0."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # The byte alphabet of ByteLevel: printable bytes stand for themselves, the others for signs from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + number): byte for number, byte in enumerate(others)}
    vocabulary |= {"<start>": START, "<end>": END}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<start>", "<end>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", model_max_length=context
    )
    tokenizer.pad_token_id = 0
    return tokenizer


NAMES = ("red_panda", "golf ball", "tench", "organ")


def clip_model(seed: int = 0, blocks: int = 3, text_width: int = 32, vision_width: int = 48) -> Any:
    """A random `CLIPModel` whose outputs differ well between inputs."""
    from transformers import CLIPConfig, CLIPModel

    ids = {"vocab_size": 258, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    return _random(
        CLIPModel,
        CLIPConfig(
            text_config={**_tower(text_width, blocks), **ids, "max_position_embeddings": CONTEXT},
            vision_config={**_tower(vision_width, blocks), "image_size": 16, "patch_size": 8},
            projection_dim=32,
        ),
        seed,
    )


def siglip_model(seed: int = 0, blocks: int = 3) -> Any:
    """A random `SiglipModel`: no causal mask, no class token, no norm before the first block."""
    from transformers import SiglipConfig, SiglipModel

    ids = {"vocab_size": 258, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    return _random(
        SiglipModel,
        SiglipConfig(
            text_config={**_tower(32, blocks), **ids, "max_position_embeddings": 48, "projection_size": 32},
            vision_config={**_tower(32, blocks), "image_size": 16, "patch_size": 8},
        ),
        seed,
    )


def _tower(width: int, blocks: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks}
    return {**sizes, "num_attention_heads": 2}


def _random(kind: Any, config: Any, seed: int) -> Any:
    model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 0 or name.startswith("logit"):
                continue
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(centre + 0.1 * torch.randn(value.shape, generator=generator))
        model.logit_scale.fill_(2.5)
    return model


def classifier(
    method: str,
    model: Any = None,
    names: Any = NAMES,
    chunk: int | None = None,
    regularisers: Any = (),
    shorten: bool | None = None,
    **options: Any,
) -> PromptedCLIP:
    """A method on a tiny model, with random contexts; methods of random weights differ in every number."""
    backbone = Backbone(clip_model() if model is None else model)
    words = backbone.words(byte_tokenizer(), shorten)
    learner = make_learner(method, backbone, words, **options)
    return PromptedCLIP(backbone, learner, words, names, regularisers, chunk)


def images(count: int = 3, seed: int = 1) -> Tensor:
    """Random images [count, 3, 16, 16]."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batch(count: int = 3, seed: int = 1) -> ImageBatch:
    """Random images with random labels."""
    labels = torch.randint(len(NAMES), (count,), generator=torch.Generator().manual_seed(seed))
    return ImageBatch(images(count, seed), labels)
