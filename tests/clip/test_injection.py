"""Prompts in the towers: where they stand, in which precision, and what else changes (nothing)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.clip.methods.base import PromptLearner
from pipeline.clip.methods.cocoop import CoCoOp
from pipeline.clip.towers.backbone import Backbone, Sizes
from pipeline.clip.towers.inject import image_prompts
from pipeline.errors import UserError
from tests.clip.tiny import batch, classifier, clip_model, images, siglip_model

DEEP: dict[str, dict[str, Any]] = {
    "coop": {"length": 2},
    "cocoop": {},
    "kgcoop": {},
    "vpt": {"depth": 3},
    "ivlp": {"depth": 3},
    "maple": {"depth": 3},
    "mpl": {"depth": 3},
}


def lengths(learner: PromptLearner, backbone: Backbone) -> list[int]:
    """The number of tokens that enter each block of the vision tower."""
    found: list[int] = []
    layers = backbone.model.vision_model.encoder.layers
    prompts = learner()
    with image_prompts(backbone.model.vision_model, learner.schedule.vision, prompts.vision, pooled_tokens=False):
        hooks = [
            layer.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0].shape[1])) for layer in layers
        ]
        backbone.model.get_image_features(pixel_values=images())
        for hook in hooks:
            hook.remove()
    return found


def test_each_block_sees_as_many_prompts_as_the_schedule_says() -> None:
    module = classifier("mpl", clip_model(blocks=5), length=1, add=2, remove=1, depth=4)
    alone = 5  # the class token and four patches
    expected = [alone + count for count in module.learner.schedule.vision.present]
    assert lengths(module.learner, module.backbone) == expected == [6, 7, 8, 9, 9]


def test_the_model_is_as_before_when_the_context_ends() -> None:
    module = classifier("mpl", depth=3)
    pixels = images()
    before = module.backbone.model.get_image_features(pixel_values=pixels).pooler_output
    assert not torch.equal(module.image_features(pixels), before)
    assert torch.equal(module.backbone.model.get_image_features(pixel_values=pixels).pooler_output, before)


def test_zero_shot_is_the_model_itself() -> None:
    module = classifier("zero_shot")
    pixels = images()
    outputs = module.backbone.model(input_ids=module.texts.ids, pixel_values=pixels)
    torch.testing.assert_close(module.logits(pixels), outputs.logits_per_image)


def test_mpl_that_adds_one_group_and_removes_all_is_maple_bit_for_bit() -> None:
    maple = classifier("maple", length=2, depth=3)
    mpl = classifier("mpl", length=2, add=1, remove=2, depth=3, template_words=True)
    renamed = {
        name.replace("compound_prompt_projections", "txt2img_proj.0"): value
        for name, value in maple.learner.state_dict().items()
    }
    mpl.learner.load_state_dict(renamed)
    pixels = images()
    assert torch.equal(mpl.logits(pixels), maple.logits(pixels))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("method", DEEP)
def test_gradients_reach_every_trainable_and_nothing_else(method: str, kind: str) -> None:
    module = classifier(method, clip_model() if kind == "clip" else siglip_model(), **DEEP[method])
    if isinstance(module.learner, CoCoOp):  # a hidden layer this narrow may be dead at random
        torch.nn.init.constant_(module.learner.meta_net.get_parameter("linear1.bias"), 1.0)
    loss, _ = module(batch())
    loss.backward()
    for name, parameter in module.learner.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in module.backbone.parameters())


@pytest.mark.parametrize("method", DEEP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_float32_masters(method: str, dtype: torch.dtype) -> None:
    module = classifier(method, **DEEP[method])
    with torch.no_grad():
        expected = module.logits(images())
    with torch.autocast("cpu", dtype):
        loss, _ = module(batch())
        found = module.logits(images())
    loss.backward()
    assert all(
        p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in module.learner.parameters()
    )
    torch.testing.assert_close(found.float(), expected, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("method", DEEP)
def test_a_backbone_in_bfloat16_takes_float32_masters(method: str) -> None:
    module = classifier(method, clip_model().to(torch.bfloat16), **DEEP[method])
    loss, _ = module(batch())
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32
        for parameter in module.learner.parameters()
    )


def test_siglip_pools_over_patches_and_not_over_prompts() -> None:
    module = classifier("vpt", siglip_model(), length=3, depth=1)
    seen: list[Tensor] = []
    head = module.backbone.model.vision_model.head
    hook = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    module.image_features(images())
    hook.remove()
    assert seen[0].shape[1] == 4  # patches of a 16 x 16 image


def test_another_kind_of_model_is_refused() -> None:
    from transformers import CLIPTextConfig

    with pytest.raises(UserError, match="'clip_text_model'; supported: clip, siglip"):
        Sizes.of(CLIPTextConfig())
