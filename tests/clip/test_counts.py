"""What is trained, counted on the real sizes of ViT-B/16 without its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.towers.backbone import Backbone
from tests.clip.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """openai/clip-vit-base-patch16 by its published configuration, on the meta device."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": 77, "vocab_size": 49408},
        vision_config={**vision, "image_size": 224, "patch_size": 16},
        projection_dim=512,
    )
    with torch.device("meta"):
        return Backbone(CLIPModel(config))


COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("mpl", {"length": 1, "add": 2, "remove": 1, "depth": 9}, 6_702_336),
    ("mpl", {"length": 1, "add": 2, "remove": 1, "depth": 9, "tied": True}, 6_702_336),
    ("maple", {"length": 2, "depth": 9}, 3_555_072),
    ("ivlp", {"length": 4, "length_vision": 4, "depth": 9}, 46_080),
    ("coop", {"length": 16}, 8_192),
    ("coop", {"length": 4}, 2_048),
    ("coop", {"length": 16, "classes": 100}, 819_200),
    ("kgcoop", {"length": 4}, 2_048),
    ("cocoop", {"length": 4}, 35_360),
    ("vpt", {"length": 4, "depth": 9}, 27_648),
    ("zero_shot", {}, 0),
]


@pytest.mark.parametrize(("method", "options", "count"), COUNTS)
def test_trainable_parameters_of_vit_b16(backbone: Backbone, method: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        learner = learner_of_sizes(method, backbone.sizes, **options)
    names = [f"class {number}" for number in range(options.get("classes", 2))]
    module = PromptedCLIP(backbone, learner, backbone.words(byte_tokenizer()), names)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == count
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in learner.parameters()}
