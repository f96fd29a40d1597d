"""Layers that keep and compute less give the same: the last one at some positions only, MLPs that keep gates once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones import lmm as backbone
from pipeline.backbones.gated import gates_kept_once
from pipeline.backbones.last_layer import last_layer_at
from pipeline.backbones.lmm import LMM
from pipeline.backbones.shortcuts import log_shortcuts
from pipeline.data.collate import collate
from pipeline.prompts import model as prompted
from pipeline.prompts.model import answers_of
from pipeline.training.normaliser import Normaliser
from tests.backbones.test_two_passes import EVERY, SELECTED, examples_of
from tests.training.worlds import make_module, make_pool

WHOLE = ("gemma3",)  # its attention norms the keys, and its layers more


@contextlib.contextmanager
def whole(decoder: nn.Module, positions: Tensor | None, attentions: Collection[str]) -> Iterator[bool]:
    yield False


def trained(lmm: LMM, insertion: str = "after_bos", checkpointing: str = "none") -> tuple[Tensor, Tensor]:
    """Loss terms of a step, and the gradient of its prompt set."""
    torch.manual_seed(0)
    module = make_module(lmm, 4, insertion, checkpointing)
    torch.nn.init.normal_(module.learner["module"].prompt, std=0.2)
    module.learner.start_stage(make_pool(3, width=lmm.width).tensors)
    batch = collate(examples_of(lmm, "none"), EVERY, [1.0] * len(EVERY), SELECTED)
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    assert module.learner["module"].prompt.grad is not None
    return torch.stack([*terms.values()]), module.learner["module"].prompt.grad


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_the_last_layer_at_the_answers_gives_the_loss_and_gradient_of_the_whole(
    lmm: LMM, insertion: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if insertion == "after_image" and lmm.family.needs_one_pass():
        pytest.skip("this architecture cannot, and says so")
    found = trained(lmm, insertion, checkpointing)
    monkeypatch.setattr(backbone, "last_layer_at", whole)
    expected = trained(lmm, insertion)
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_only_the_asked_positions_leave_the_last_layer(lmm: LMM) -> None:
    at = torch.tensor([[3, 5], [1, 1]])
    torch.manual_seed(0)
    embeddings = torch.randn(2, 6, lmm.width)
    attention = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with last_layer_at(lmm.decoder, at, lmm.family.lean_attentions) as lean:
        if lmm.family.needs_image_mask:
            pytest.skip("its decoder needs an image")
        found = lmm.decoder(inputs_embeds=embeddings, attention_mask=attention).last_hidden_state
    assert lean is (lmm.family.kind not in WHOLE)
    expected = lmm.hidden(embeddings, attention)
    assert expected.shape == (2, 6, lmm.width)  # the layer is as before
    torch.testing.assert_close(found, expected[torch.arange(2)[:, None], at], atol=1e-5, rtol=1e-5)


def test_gates_kept_once_change_no_bit_and_keep_less(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> tuple[int, tuple[Tensor, Tensor]]:
        storages: dict[int, Tensor] = {}

        def pack(value: Tensor) -> Tensor:
            storages[value.untyped_storage()._cdata] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            result = trained(lmm)
        return sum(value.untyped_storage().nbytes() for value in storages.values()), result

    less, found = kept()
    monkeypatch.setattr(prompted, "gates_kept_once", lambda *_: contextlib.nullcontext())
    more, expected = kept()
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    if lmm.family.kind in WHOLE:
        assert less == more
    else:
        assert less < more


def test_layers_are_as_before_afterwards(lmm: LMM) -> None:
    last = last_layer_at(lmm.decoder, torch.zeros(1, 1).long(), lmm.family.lean_attentions)
    with contextlib.suppress(ZeroDivisionError), gates_kept_once(lmm), last:
        raise ZeroDivisionError
    for layer in lmm.decoder.layers:  # type: ignore[union-attr]
        assert "forward" not in layer.__dict__ and "forward" not in layer.mlp.__dict__


def test_answers_are_found_wherever_they_stand() -> None:
    none = -100
    answers = answers_of(torch.tensor([[none, none, 7, 8, none], [none, 5, none, none, none], [none] * 5]))
    assert answers.targets.tolist() == [[7, 8], [5, none], [none, none]]
    assert answers.at[0].tolist() == [1, 2] and int(answers.at[1, 0]) == 0


def test_the_shortcuts_of_a_model_are_told_with_what_is_in_the_way_of_the_others(
    lmm: LMM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="pipeline.backbones"):
        log_shortcuts(lmm.family, lmm.decoder)
    (line,) = caplog.messages
    if lmm.family.kind in WHOLE:
        assert "shortcuts taken: none; not last layer at the answers only: Gemma3Attention is not known" in line
        assert "not prefix cache for shared images: Gemma 3 has sliding-window attention layers" in line
    else:
        assert line.endswith(
            "shortcuts taken: last layer at the answers only, gated MLPs keep two vectors per token, prefix cache for "
            "shared images"
        )
