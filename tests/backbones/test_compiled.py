"""Compiled layers give the loss and gradient of the others, and are compiled once for all layers, lengths and steps."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.backbones.compiled import Compiled, counted_compilations, require_compiler
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.collate import collate
from pipeline.errors import UserError
from pipeline.prompts.model import LearnerOnLMM
from pipeline.training.normaliser import Normaliser
from pipeline.training.operations import OperationCount, counting
from tests import tiny
from tests.backbones.test_packing import learner_on
from tests.backbones.test_two_passes import EVERY, SELECTED, examples_of

WITHOUT_TOWER = ("fast_vlm", "qwen2_5_vl")
# Batches of several lengths, with and without padding, and of one sample.
BATCHES = (EVERY, EVERY[1:3], EVERY[:1], EVERY[2:6], EVERY[4:])


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(module: LearnerOnLMM, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Loss terms of a step on these samples, and the gradient of its prompt set."""
    module.zero_grad()
    batch = collate(examples_of(module.lmm, "none"), indices, [1.0] * len(indices), SELECTED)
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    assert module.learner["module"].prompt.grad is not None
    return torch.stack([*terms.values()]), module.learner["module"].prompt.grad.clone()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradient_are_those_of_layers_that_are_not_compiled(lmm: LMM, checkpointing: str) -> None:
    module = learner_on(lmm, "after_bos", checkpointing)
    expected = [step(module, indices) for indices in BATCHES]
    assert expected[0][1].abs().max() > 1e-3
    before = counted_compilations()
    module.compiled = Compiled(lmm, tower=lmm.family.kind not in WITHOUT_TOWER, backend="aot_eager")
    with counting(OperationCount()) as count:  # a stage counts its first micro-batch
        first = step(module, BATCHES[0])
    assert count.operations > 0
    found = [first, *(step(module, indices) for indices in BATCHES[1:])]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    made = counted_compilations() - before
    for indices in BATCHES:
        step(module, indices)
    assert counted_compilations() - before == made > 0
    for layer in module.compiled.layers:
        assert "forward" not in layer.__dict__


def test_one_code_serves_all_layers_and_lengths_and_the_last_layer_is_left_alone(tmp_path: Path) -> None:
    lmm = load_lmm(ModelConfig(path=str(tiny.save_llava(tmp_path / "llava", layers=5)), max_length=512))
    module = learner_on(lmm, "after_bos", "none")
    expected = [step(module, indices) for indices in BATCHES]
    module.compiled = Compiled(lmm, backend="aot_eager")
    layers = list(lmm.decoder.layers)  # type: ignore[arg-type]
    assert module.compiled.layers == {*layers[:-1]}
    before = counted_compilations()
    torch.testing.assert_close([step(module, indices) for indices in BATCHES], expected, atol=1e-5, rtol=1e-5)
    # One for batches with padding, which have a mask, and one for a single sample, which has none.
    assert counted_compilations() - before <= 2


@pytest.mark.slow
def test_code_of_inductor_gives_the_same_loss_and_gradient(tmp_path: Path) -> None:
    lmm = load_lmm(ModelConfig(path=str(tiny.save_llava(tmp_path / "llava", layers=3)), max_length=512))
    module = learner_on(lmm, "after_bos", "none")
    expected = [step(module, indices) for indices in BATCHES]
    require_compiler(torch.device("cpu"))
    module.compiled = Compiled(lmm, tower=True)
    torch.testing.assert_close([step(module, indices) for indices in BATCHES], expected, atol=1e-5, rtol=1e-5)


def test_a_tower_without_layers_that_are_alike_is_refused(lmm: LMM) -> None:
    if lmm.family.kind not in WITHOUT_TOWER:
        assert Compiled(lmm, tower=True, backend="eager").layers > Compiled(lmm, backend="eager").layers
        return
    with pytest.raises(UserError, match=r"decoder_and_tower is not possible with this .*; expected decoder\.$"):
        Compiled(lmm, tower=True, backend="eager")


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler on CPUs, and g\+\+, clang\+\+, c\+\+ was not found"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton for GPUs"):
        require_compiler(torch.device("cuda"))
