"""The faster paths give the numbers of the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.clip.benchmark.predict import predictions
from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from tests.clip.tiny import CONTEXT, batch, classifier, images

METHODS: dict[str, dict[str, Any]] = {
    "coop": {"length": 2},
    "cocoop": {},
    "kgcoop": {},
    "ivlp": {"depth": 3},
    "maple": {"depth": 3},
    "mpl": {"depth": 3},
}
EXACT: Any = {"atol": 1e-6, "rtol": 1e-6}


def gradients(module: PromptedCLIP) -> dict[str, Tensor]:
    module.zero_grad()
    given = batch()
    module(ImageBatch(images().to(module.backbone.scale.dtype), given.labels))[0].backward()
    return {name: p.grad.clone() for name, p in module.learner.named_parameters() if p.grad is not None}


def assert_same(found: PromptedCLIP, expected: PromptedCLIP) -> None:
    found.learner.load_state_dict(expected.learner.state_dict())
    pixels = images()
    with torch.no_grad():
        torch.testing.assert_close(found.logits(pixels), expected.logits(pixels), **EXACT)
    # In float64, so that rounding, which alone makes gradients differ by some 1e-6, hides no difference.
    for (name, first), second in zip(
        gradients(found.double()).items(), gradients(expected.double()).values(), strict=True
    ):
        torch.testing.assert_close(first, second, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_texts_that_end_at_their_last_token(method: str) -> None:
    whole = classifier(method, shorten=False, **METHODS[method])
    short = classifier(method, **METHODS[method])
    assert whole.texts.ids.shape[1] == CONTEXT
    assert short.texts.ids.shape[1] < CONTEXT // 2
    assert_same(short, whole)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_classes_that_are_computed_again(method: str, chunk: int) -> None:
    assert_same(classifier(method, chunk=chunk, **METHODS[method]), classifier(method, **METHODS[method]))


def test_chunks_keep_no_activations_of_the_text_tower() -> None:
    def kept(chunk: int | None) -> int:
        module = classifier("coop", length=2, chunk=chunk)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
            module.text_features()
        return sum(sizes)

    assert kept(2) < kept(None) / 10


def test_many_texts_go_in_parts_where_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    module, pixels, texts = classifier("cocoop"), images(), []
    module.backbone.model.text_model.register_forward_hook(lambda *seen: texts.append(len(seen[2].pooler_output)))
    with torch.no_grad():
        whole = module.logits(pixels)
        monkeypatch.setattr("pipeline.clip.towers.encode.AT_ONCE", 5)
        torch.testing.assert_close(module.logits(pixels), whole, **EXACT)
    assert texts == [12, 5, 5, 2]  # 3 images x 4 classes
    module.logits(pixels)
    assert texts[4:] == [12]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cocoop"])
def test_text_features_kept_in_evaluation(method: str) -> None:
    module = classifier(method, **METHODS[method])
    with torch.no_grad():
        kept = module.text_features()
        for seed in (1, 2):
            pixels = images(seed=seed)
            torch.testing.assert_close(module.logits(pixels, text_features=kept), module.logits(pixels), **EXACT)


@pytest.mark.parametrize(("method", "passes"), [("maple", 1), ("cocoop", 3)])
def test_predictions_read_the_texts_once_where_they_can(method: str, passes: int) -> None:
    module = classifier(method, **METHODS[method])
    calls: list[int] = []
    hook = module.backbone.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    batches = [images(seed=seed) for seed in (1, 2, 3)]
    found = predictions(module, batches)
    hook.remove()
    assert len(calls) == passes
    with torch.no_grad():
        assert torch.equal(found, torch.cat([module.logits(pixels).argmax(dim=1) for pixels in batches]))


@pytest.mark.parametrize("method", ["coop", "kgcoop", "cocoop"])
def test_image_features_kept_for_methods_that_leave_images_alone(method: str) -> None:
    module = classifier(method, **METHODS[method])
    assert not module.learner.changes_images
    expected = gradients(module)
    features = module.image_features(images())
    module.zero_grad()
    module(ImageBatch(None, batch().labels, image_features=features))[0].backward()
    for name, value in expected.items():
        torch.testing.assert_close(module.learner.get_parameter(name).grad, value, **EXACT)


def test_cocoop_batched_over_images_is_one_image_at_a_time() -> None:
    module = classifier("cocoop")
    pixels = images()
    with torch.no_grad():
        alone = torch.cat([module.logits(pixels[number : number + 1]) for number in range(len(pixels))])
        torch.testing.assert_close(module.logits(pixels), alone, **EXACT)
