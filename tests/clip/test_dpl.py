"""DPL: prompts as keys and values of one block, and mixtures of several lengths of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.search.choice import arrange, choose
from pipeline.clip.search_space import SearchSpace, TowerOptions
from pipeline.clip.towers.backbone import Backbone, Sizes
from pipeline.clip.towers.extra_keys import extra_keys, mixed_attention
from pipeline.clip.towers.schedule import Op, PromptSchedule, TowerSchedule, keys_and_values
from pipeline.errors import UserError
from tests.clip.project import make_project, recipe_file, said
from tests.clip.tiny import NAMES, batch, byte_tokenizer, classifier, clip_model, images, siglip_model

LENGTHS: dict[str, Any] = {"text": [1, 0, 3], "vision": [0, 2, 1]}
OPTIONS = TowerOptions((0, 1, 3), (0, 2))
MODELS = {"clip": clip_model, "siglip": siglip_model}


def mixture(model: Any, plain: bool = False, shorten: bool | None = None, chunk: int | None = None) -> PromptedCLIP:
    """A search on a tiny model, whose options and weights differ well from each other."""
    backbone = Backbone(model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        space = SearchSpace(backbone.sizes, OPTIONS, start="released", plain=plain)
        for alphas in space.alphas.values():
            torch.nn.init.normal_(alphas)
    return PromptedCLIP(backbone, space, backbone.words(byte_tokenizer(), shorten), NAMES, text_chunk=chunk)


def gradients(module: PromptedCLIP) -> dict[str, Tensor]:
    module.zero_grad()
    inputs = batch()
    pixels = inputs.pixel_values
    assert pixels is not None
    module(type(inputs)(pixels.to(module.backbone.model.dtype), inputs.labels))[0].backward()
    return {name: value.grad for name, value in module.learner.named_parameters() if value.grad is not None}


def test_lengths_of_zero_are_zero_shot_bit_for_bit() -> None:
    nothing, zero_shot = classifier("dpl", text=0, vision=[0, 0, 0]), classifier("zero_shot")
    assert torch.equal(nothing.logits(images()), zero_shot.logits(images()))
    assert not nothing.learner.changes_images
    assert not list(nothing.learner.parameters())


def test_image_prompts_behind_the_patches_are_those_that_the_next_block_removes() -> None:
    """A schedule that adds before a block and removes before the next one computes the same, bit for bit."""
    module = classifier("dpl", text=0, vision=[0, 2, 1])
    found = module.image_features(images())
    tower = TowerSchedule("vision", (Op(), Op(add=2), Op(remove=2, add=1)))
    same = PromptSchedule(module.learner.schedule.text, tower)
    assert torch.equal(found, module.backbone.image(images(), same, module.learner().vision))


def test_text_prompts_in_front_are_the_released_order_of_keys() -> None:
    """Released: behind the start token, in columns of the mask that every token sees; so the start token does too."""
    layers = clip_model().double().text_model.encoder.layers
    layer, generator = layers[1], torch.Generator().manual_seed(0)
    tokens, prompts = (torch.randn(*size, 32, generator=generator).double() for size in ((2, 5), (3,)))
    normed, rows = layer.layer_norm1(tokens), layer.layer_norm1(prompts).expand(2, -1, -1)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    with extra_keys(layers, {1: prompts}, front=True):
        found = layer.self_attn(hidden_states=normed, attention_mask=mask[None, None].expand(2, -1, -1, -1))[0]
    keys = torch.cat([normed[:, :1], rows, normed[:, 1:]], dim=1)
    seen = torch.cat([mask[:, :1], torch.zeros(5, 3), mask[:, 1:]], dim=1)
    attention = layer.self_attn
    query, key, value = (
        project(given).unflatten(-1, (2, -1)).transpose(1, 2)
        for project, given in ((attention.q_proj, normed), (attention.k_proj, keys), (attention.v_proj, keys))
    )
    scores = query @ key.mT * attention.scale + seen
    expected = attention.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(found[:, 0], attention.out_proj(attention.v_proj(normed[:, 0])))


@pytest.mark.parametrize("model", MODELS)
def test_attention_implementations_agree(model: str) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        made = MODELS[model]()
        made.set_attn_implementation(attention)
        found += [classifier("dpl", made, seed=1, **LENGTHS).logits(images()), mixture(made).logits(images())]
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_the_fast_mixture_is_one_attention_per_option(model: str) -> None:
    fast, plain = (mixture(MODELS[model]().double(), form).double() for form in (False, True))
    pixels = images().double()
    torch.testing.assert_close(fast.logits(pixels), plain.logits(pixels), atol=1e-12, rtol=1e-12)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(fast)[name], value, atol=1e-12, rtol=1e-9, msg=name)


def test_shortened_texts_and_chunks_are_whole_ones() -> None:
    whole, parts = mixture(clip_model(), shorten=False), mixture(clip_model(), shorten=True, chunk=2)
    torch.testing.assert_close(whole.text_features(), parts.text_features(), atol=1e-6, rtol=0)
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("choice", [0, 1])
def test_a_weight_of_one_is_training_with_that_length(choice: int) -> None:
    module = mixture(clip_model())
    space = module.learner
    assert isinstance(space, SearchSpace)
    chosen: dict[str, Any] = {"text": OPTIONS.text[choice], "vision": OPTIONS.vision[choice]}
    trained = classifier("dpl", module.backbone.model, **chosen)
    with torch.no_grad():
        for tower, alphas in space.alphas.items():
            alphas.fill_(-1e9)
            alphas[:, choice] = 0
            for block in range(3) if chosen[tower] else ():
                prompts = space.get_parameter(f"ctx_{tower}.{block}_{chosen[tower]}")
                trained.learner.get_parameter(f"ctx_{tower}.{block}").copy_(prompts)
    torch.testing.assert_close(module.logits(images()), trained.logits(images()), atol=1e-5, rtol=0)


def test_weights_depend_on_differences_alone() -> None:
    module = mixture(clip_model())
    before = module.logits(images())
    with torch.no_grad():
        for alphas in module.learner.alphas.values():  # type: ignore[operator]
            alphas += 2.0
    torch.testing.assert_close(module.logits(images()), before, atol=1e-5, rtol=0)


def test_gradients_of_weights_are_central_differences() -> None:
    module = mixture(clip_model().double()).double()
    found = gradients(module)
    inputs = batch()
    inputs = type(inputs)(images().double(), inputs.labels)
    for tower in ("text", "vision"):
        alphas = module.learner.get_parameter(f"alphas_{tower}")
        for place in [(0, 0), (1, 1), (2, 1)]:
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    alphas[place] += sign * 1e-5
                    losses.append(float(module(inputs)[0]))
                    alphas[place] -= sign * 1e-5
            assert float(found[f"alphas_{tower}"][place]) == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-8)


def test_the_gradient_of_a_weight_is_what_its_option_adds_to_the_mean() -> None:
    """d/d alpha_c = A_c (<g, o_c> - sum over options of A <g, o>), for one attention."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values, g = torch.randn(4, 2, 3, 5, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    alphas = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)

    def mixed(weights: Tensor) -> Tensor:
        return mixed_attention(queries, (keys, values), (rows[0], rows[1]), ([1, 2], weights), None)

    weights = alphas.softmax(0)
    (mixed(weights) * g).sum().backward()
    with torch.no_grad():
        each = torch.stack([(mixed(one) * g).sum() for one in torch.eye(3, dtype=torch.float64)])
        torch.testing.assert_close(alphas.grad, weights * (each - (weights * each).sum()))


def test_the_scale_of_a_prompt_hardly_matters() -> None:
    """Prompts pass the layer norm: scaled by 10 only its epsilon tells them apart."""
    module = classifier("dpl", seed=1, **LENGTHS)
    with torch.no_grad():
        for value in module.learner.parameters():
            value.mul_(50)  # deviation 1, far above the epsilon
        before = module.logits(images())
        for value in module.learner.parameters():
            value.mul_(10)
    torch.testing.assert_close(module.logits(images()), before, atol=2e-3, rtol=0)


def test_bfloat16() -> None:
    for module in (classifier("dpl", clip_model().bfloat16(), **LENGTHS), mixture(clip_model().bfloat16())):
        assert all(value.isfinite().all() for value in gradients(module).values())


def test_nothing_stays_on_the_model() -> None:
    module, plain = mixture(clip_model()), classifier("zero_shot")
    gradients(module)
    assert not any("forward" in vars(part) for part in module.backbone.modules())
    texts = module.backbone.text(plain.texts.ids, plain.texts.rows, plain.learner.schedule, {})
    assert torch.equal(texts, plain.text_features())


def test_trainables_on_vitb16() -> None:
    """512 per text prompt and 768 per image prompt; the search has the prompts of all options and their weights."""
    sizes = Sizes(12, 512, 12, 768, 512)
    text, vision = [1, 0, 2, 0, 0, 0, 6, 0, 0, 0, 0, 1], [0] * 11 + [3]
    learner = learner_of_sizes("dpl", sizes, text=text, vision=vision)
    assert sum(value.numel() for value in learner.parameters()) == 512 * 10 + 768 * 3
    with torch.device("meta"):
        space = SearchSpace(sizes, TowerOptions(tuple(range(7)), tuple(range(7))))
    assert sum(value.numel() for value in space.vectors.values()) == 129_024 + 193_536
    assert sum(value.numel() for value in space.alphas.values()) == 168


def test_equal_weights_choose_the_shorter() -> None:
    alphas = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.004, 0.0]])
    found = choose(alphas, [0, 2, 4])
    assert found.lengths == [0, 2, 2]
    assert found.gaps == pytest.approx([0, 0, float(alphas[2].softmax(0)[1] - alphas[2].softmax(0)[0])])
    assert choose(alphas, [0, 2, 4], tie=0.01).lengths == [0, 2, 0]


def test_controls_have_as_many_prompts_as_were_found() -> None:
    found = {"text": [0, 2, 1, 4], "vision": [3, 3, 3]}
    assert arrange(found, "found", 1) == found
    assert arrange(found, "even", 1) == {"text": [2, 2, 2, 1], "vision": [3, 3, 3]}
    shuffled = [arrange(found, "shuffled", seed) for seed in range(20)]
    assert all(sorted(one["text"]) == [0, 1, 2, 4] and one["text"] != found["text"] for one in shuffled)
    assert all(one["vision"] == [3, 3, 3] for one in shuffled)
    assert len({tuple(one["text"]) for one in shuffled}) > 5
    assert arrange(found, "shuffled", 3) == arrange(found, "shuffled", 3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ([1, 2], "2 prompt lengths are given for the text tower, which has 3 blocks"),
        ([0, -1, 2], "Block 1 of the text tower would get -1 prompts"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(text: list[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        keys_and_values(text, 1, (3, 3))


def test_a_tower_has_prompts_of_one_kind() -> None:
    with pytest.raises(UserError, match="in its sequence and as keys and values"):
        TowerSchedule("vision", (Op(add=1), Op()), (0, 1))


@pytest.mark.parametrize("text", ["two", [1, "two", 0], True, 1.5])
def test_lengths_that_are_no_numbers_are_refused(tmp_path: Path, text: Any) -> None:
    found = said("check", str(recipe_file(make_project(tmp_path), {"name": "dpl", "options": {"text": text}})))
    assert "text" in found and "expected" in found


def test_check_says_lengths_that_do_not_fit(tmp_path: Path) -> None:
    make_project(tmp_path)
    found = said("check", str(recipe_file(tmp_path, {"name": "dpl", "options": {"text": [1, 2]}})))
    assert "methods.dpl: 2 prompt lengths are given for the text tower, which has 3 blocks" in found


def test_a_row_without_any_prompt_is_refused(tmp_path: Path) -> None:
    make_project(tmp_path)
    for options in ({}, {"text": [0, 0, 0], "vision": 0}):
        assert "no prompt in any block" in said(
            "check", str(recipe_file(tmp_path, {"name": "dpl", "options": options}))
        )
