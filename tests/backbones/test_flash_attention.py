"""FlashAttention 2 in the decoder: the last layer at the answers only, and packed samples by their lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones import lmm as backbone
from pipeline.backbones.last_layer import why_whole
from pipeline.backbones.lmm import LMM
from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.packing import Packed, require_packing
from pipeline.backbones.shortcuts import log_shortcuts
from pipeline.config.models import ModelConfig
from pipeline.planning.model_shape import meta_model
from tests.backbones.flash_on_cpu import NAME, use_flash_on_cpu
from tests.backbones.test_lean_layers import trained, whole
from tests.backbones.test_packing import learner_on
from tests.backbones.test_packing import trained as trained_short
from tests.backbones.test_two_passes import able

__all__ = ["able"]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_loss_and_gradient_are_those_of_sdpa_and_the_last_layer_is_not_computed_whole(
    able: LMM, insertion: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(able, insertion)
    assert expected[1].abs().max() > 1e-3
    calls = use_flash_on_cpu(able, monkeypatch)
    torch.testing.assert_close(trained(able, insertion, checkpointing), expected, atol=1e-5, rtol=1e-5)
    if checkpointing == "none":
        layers, passes = len(able.decoder.layers), 1 + (insertion == "after_image")  # type: ignore[arg-type]
        assert len(calls) == passes * (layers - 1) and "lengths" in calls
    monkeypatch.setattr(backbone, "last_layer_at", whole)
    torch.testing.assert_close(trained(able, insertion), expected, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_model_attends_with_its_own_weights(able: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    use_flash_on_cpu(able, monkeypatch)
    at, attention = torch.tensor([[3, 5], [1, 1]]), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    torch.manual_seed(0)
    inputs = {"inputs_embeds": torch.randn(2, 6, able.width), "attention_mask": attention}
    before = able.decode(at, **inputs)
    other = copy.deepcopy(able)
    assert torch.equal(other.decode(at, **inputs), before)
    other.decoder.layers[-1].self_attn.q_proj.weight.data.mul_(2)  # type: ignore[union-attr,index]
    assert not torch.allclose(other.decode(at, **inputs), before) and torch.equal(able.decode(at, **inputs), before)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("insertion", ["after_bos", "before_image"])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "whole"])
def test_samples_in_one_row_give_what_the_block_mask_gives_and_no_column_is_empty(
    able: LMM, insertion: str, checkpointing: str, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = trained_short(learner_on(able, insertion, "none"))
    module = learner_on(able, insertion, checkpointing)
    module.packing = True
    masked = trained_short(module)
    assert module.fill.tokens < module.fill.computed
    calls = use_flash_on_cpu(able, monkeypatch)
    require_packing(able)
    if not lean:
        monkeypatch.setattr(backbone, "last_layer_at", whole)
    module = learner_on(able, insertion, checkpointing)
    module.packing = True
    found = trained_short(module)
    torch.testing.assert_close(found, masked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)
    assert module.fill.tokens == module.fill.computed < module.fill.padded
    assert {*calls} == {"lengths"}


def test_sequences_behind_each_other_keep_their_order_and_their_boundaries() -> None:
    attention = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    packed = Packed.of(attention, one_row=True)
    assert packed.owners.tolist() == [[0, 0, 1, 1, 1, 1, 2]] and packed.saves
    boundaries = packed.boundaries
    assert boundaries["cu_seq_lens_k"].tolist() == boundaries["cu_seq_lens_q"].tolist() == [0, 2, 6, 7]
    assert (boundaries["max_length_q"], boundaries["max_length_k"]) == (4, 4)
    columns, among = packed.places(torch.tensor([[1, 0], [3, 2], [3, 3]]))
    assert columns[0, among].tolist() == [[1, 0], [5, 4], [6, 6]]
    assert not Packed.of(torch.ones(3, 4), one_row=True).saves  # nothing is empty, so nothing is gained


def test_a_model_is_planned_with_a_kernel_that_is_not_installed(checkpoint: Path) -> None:
    settings = ModelConfig(path=str(checkpoint), attn_implementation=NAME, dtype="bfloat16")
    built: Any = meta_model(settings)
    family = family_of(built.config.model_type)
    assert built.model.get_submodule(family.decoder).config._attn_implementation == NAME
    assert built.config.vision_config._attn_implementation == (NAME if family.tower_attends else "eager")


def test_shortcuts_with_flash_attention_and_what_it_has_no_rows_for(
    able: LMM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_flash_on_cpu(able, monkeypatch)
    with caplog.at_level("INFO", logger="pipeline.backbones"):
        log_shortcuts(able.family, able.decoder)
    assert "shortcuts taken: last layer at the answers only" in caplog.text
    attention, lean = able.decoder.layers[-1].self_attn, able.family.lean_attentions  # type: ignore[union-attr,index]
    monkeypatch.setattr(able.decoder.config, "sliding_window", 8, raising=False)
    assert "knows of sliding windows without a mask" in why_whole(attention, lean)
    monkeypatch.setattr(able.decoder.config, "_attn_implementation", "flex_attention")
    assert "'flex_attention' takes no mask with a row per position" in why_whole(attention, lean)
