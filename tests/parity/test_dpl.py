"""DPL against recorded numbers (`--fixtures DIR`, folder dpl/): search, choices and training, on every exact path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods.regularisers import Consistency
from pipeline.clip.search.choice import choose
from pipeline.clip.search.engine import Rates, SearchEngine
from pipeline.clip.towers.schedule import schedule
from pipeline.training.normaliser import Normaliser
from tests.parity.recorded_dpl import Recorded, own_names, part

# What an independent float32 re-implementation met, with room: features and logits, losses, gradients (relative to the
# largest entry of a run), values after three steps.
FEATURES, LOSS, GRADIENT, STEPS = 1e-5, 5e-6, 1e-5, 1e-6
# Attention of the backbone, texts shortened, texts per pass.
PATHS = {"sdpa": ("sdpa", True, None), "eager": ("eager", True, None), "whole, in chunks": ("sdpa", False, 2)}
FORMS = {"fast": False, "one attention per option": True}
TRAININGS = ("train_default", "train_ensemble")


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest) -> Recorded:
    root = request.config.getoption("--fixtures")
    if not root or not (Path(root) / "dpl").is_dir():
        pytest.skip("no recorded results: give --fixtures DIR with a folder dpl/")
    return Recorded(Path(root).resolve() / "dpl")


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def gradients_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        error = float((found[name] - value).abs().max()) / largest
        assert error <= GRADIENT, f"{name}: {error:.1e} of the largest entry"


def gradients(module: PromptedCLIP, loss: Tensor) -> dict[str, Tensor]:
    named = dict(module.learner.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_search(recorded: Recorded, path: str, form: str) -> None:
    attention, shorten, chunk = PATHS[path]
    module = recorded.search(recorded.backbone(attention), shorten, chunk, FORMS[form])
    wanted, batch = recorded.tensors("search"), recorded.batches("val")[0]
    assert batch.pixel_values is not None
    with torch.no_grad():
        close(module.image_features(batch.pixel_values), wanted["image_features"], FEATURES)
        close(module.text_features(), wanted["text_features"], FEATURES)
        close(module.logits(batch.pixel_values), wanted["logits"], FEATURES)
    loss, _ = module(batch)
    close(loss.detach(), wanted["loss_val"], LOSS)
    gradients_close(gradients(module, loss), own_names(part(wanted, "grad.")))


def test_choices(recorded: Recorded) -> None:
    for name, case in recorded.choices.items():
        alphas = torch.tensor(case["alphas"])
        assert choose(alphas, range(alphas.shape[1])).lengths == case["lengths"], name


@pytest.mark.parametrize("run", TRAININGS)
@pytest.mark.parametrize("path", PATHS)
def test_training(recorded: Recorded, run: str, path: str) -> None:
    attention, shorten, chunk = PATHS[path]
    module = recorded.training(run, recorded.backbone(attention), shorten, chunk)
    wanted, batches = recorded.tensors(run), recorded.batches("train")
    assert batches[0].pixel_values is not None
    with torch.no_grad():
        close(module.image_features(batches[0].pixel_values), wanted["image_features"], FEATURES)
        close(module.text_features(), wanted["text_features"], FEATURES)
        close(module.logits(batches[0].pixel_values), wanted["logits"], FEATURES)
    loss, _ = module(batches[0])
    close(loss.detach(), wanted["loss_ce"], LOSS)
    gradients_close(gradients(module, loss), own_names(part(wanted, "grad.")))
    settings: dict[str, Any] = recorded.settings["optimizer"]
    optimizer = torch.optim.SGD(module.learner.parameters(), **settings)
    for batch, expected in zip(batches, wanted["trajectory"], strict=True):
        optimizer.zero_grad()
        loss, _ = module(batch)
        close(loss.detach(), expected, LOSS)
        loss.backward()
        optimizer.step()
    for name, value in own_names(part(wanted, "after.")).items():
        close(module.learner.get_parameter(name).detach(), value, STEPS)


@pytest.mark.parametrize("run", TRAININGS)
def test_end_positions(recorded: Recorded, run: str) -> None:
    module = recorded.training(run, recorded.backbone(), True, None)
    ends = (module.texts.ids == module.words.tokenizer.eos_token_id).int().argmax(dim=1)
    assert ends.tolist() == recorded.tensors(run)["end_positions"].tolist()


@pytest.mark.parametrize("run", TRAININGS)
@pytest.mark.parametrize("teacher", ["fixed", "released"])
def test_distillation(recorded: Recorded, run: str, teacher: str) -> None:
    """The released teacher knows the last of the templates alone; ours is the mean over all of them."""
    module = recorded.training(run, recorded.backbone(), True, None)
    wanted, batch = recorded.tensors(run), recorded.batches("train")[0]
    assert batch.pixel_values is not None
    templates: list[str] = recorded.meta["templates"]["ensemble and teacher"]
    term = Consistency(0.0, 0.0, 1.0, templates if teacher == "fixed" else templates[-1:])
    module.regularisers = (term,)
    module.set_classes(recorded.names)
    assert term._texts is not None
    with torch.no_grad():
        images = module.backbone.image(batch.pixel_values, schedule([], [], module.backbone.sizes.blocks), {})
        close(module.backbone.logits(images, term._texts), wanted[f"zero_shot_logits_{teacher}"], FEATURES)
    cross_entropy = module(batch)[1]["cross_entropy"]
    loss, terms = module(batch)
    close(terms["logit_consistency"], wanted[f"loss_kl_{teacher}"], LOSS)
    close(loss.detach(), cross_entropy + terms["logit_consistency"], LOSS)
    if teacher == "fixed":
        module.regularisers = ()
        plain = gradients(module, module(batch)[0])
        module.regularisers = (term,)
        both = gradients(module, module(batch)[0])
        gradients_close({n: both[n] - plain[n] for n in both}, own_names(part(wanted, "grad_kl_fixed.")))


@pytest.mark.parametrize("form", FORMS)
def test_three_steps_of_a_search(recorded: Recorded, form: str) -> None:
    module = recorded.search(recorded.backbone(), True, None, FORMS[form])
    wanted, validation = recorded.tensors("search"), recorded.batches("val")
    sgd, adam = recorded.settings["optimizer"], recorded.settings["alpha_optimizer"]
    rates = Rates(sgd["lr"], adam["lr"], sgd["momentum"], sgd["weight_decay"])
    engine = SearchEngine(module, rates, lambda step: (validation[step], float(len(validation[step].labels))), 1, 1)
    losses = []
    for batch in recorded.batches("train"):
        losses.append(engine.accumulate(batch, Normaliser(*batch.counts())).flip(0))  # validation, then training
        engine.step()
    close(torch.stack(losses), wanted["trajectory"], LOSS)
    after = own_names(part(wanted, "after."))
    assert set(after) == set(engine.values())
    for name, value in engine.values().items():
        close(value, after[name], STEPS)
