"""CoOp with descriptions of the classes against recorded numbers (`--fixtures DIR`, folders active/ and dpl/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.methods import make_learner
from pipeline.clip.recipe_descriptions import Mode
from tests.parity.recorded_dpl import Recorded
from tests.parity.test_dpl import FEATURES, GRADIENT, LOSS, PATHS, STEPS, close

MODES: dict[str, Mode | None] = {"none": None, "AE": "features", "AS": "logits"}


class Described:
    """The recorded runs: CoOp on the CLIP in dpl/, with one text per class or with descriptions."""

    def __init__(self, root: Path) -> None:
        self.folder, self.dpl = root / "active", Recorded(root / "dpl")
        self.content: dict[str, Any] = json.loads((self.folder / "descriptors.json").read_text("utf-8"))

    def run(self, mode: str, contexts: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"descriptors_{mode}_{contexts}{self.content['context']}.safetensors")

    def module(self, mode: str, contexts: str, path: str) -> PromptedCLIP:
        attention, shorten, chunk = PATHS[path]
        names, backbone, words = self.content["classnames"], self.dpl.backbone(attention), self.dpl.words(shorten)
        averaged = MODES[mode]
        descriptions = averaged and Descriptions.of_lists(averaged, self.content["descriptors"], "descriptors.json")
        count = len(names) if not descriptions else len(descriptions.described(names))
        options = {"classes": count} if contexts == "each" else {}
        learner = make_learner("coop", backbone, words, length=self.content["context"], **options)
        module = PromptedCLIP(backbone, learner, words, names, text_chunk=chunk, descriptions=descriptions or None)
        with torch.no_grad():
            learner.get_parameter("ctx").copy_(self.run(mode, contexts)["param.ctx"])
        return module


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest) -> Described:
    root = request.config.getoption("--fixtures")
    if not root or not (Path(root) / "active" / "descriptors.json").is_file():
        pytest.skip("no recorded results: give --fixtures DIR with folders active/ and dpl/")
    return Described(Path(root).resolve())


@pytest.mark.parametrize("contexts", ["each", "shared"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_descriptions(recorded: Described, path: str, mode: str, contexts: str) -> None:
    wanted, module = recorded.run(mode, contexts), recorded.module(mode, contexts, path)
    batch, ctx = ImageBatch(wanted["pixel_values"], wanted["labels"]), module.learner.get_parameter("ctx")
    with torch.no_grad():
        close(module.logits(batch.pixel_values), wanted["logits"], FEATURES)
    loss, _ = module(batch)
    close(loss.detach(), wanted["trajectory"][0], LOSS)
    (gradient,) = torch.autograd.grad(loss, [ctx])
    error = float((gradient - wanted["grad.ctx"]).abs().max() / wanted["grad.ctx"].abs().max())
    assert error <= GRADIENT, f"{error:.1e} of the largest entry"
    settings: dict[str, Any] = recorded.dpl.settings["optimizer"]
    optimizer = torch.optim.SGD([ctx], **settings)
    for step in range(3):
        loss, _ = module(batch)
        close(loss.detach(), wanted["trajectory"][step], LOSS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(ctx.detach(), wanted["after.ctx"], STEPS)
