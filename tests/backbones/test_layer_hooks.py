"""Changes before a decoder's layers: which decoders take them, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.layer_hooks import (
    LayerInputs,
    changed_layers,
    require_masks,
    require_usual_layers,
    without_keys,
)
from pipeline.errors import UserError


class Usual(nn.Module):
    """A layer with transformers' usual arguments; it returns what it was given."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        return hidden_states, attention_mask, past_key_values


class Other(nn.Module):
    """A layer that takes no cache by that name."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, layer_past: Any = None) -> Any:
        return hidden_states, attention_mask, layer_past


def lmm_of(*layers: nn.Module) -> Any:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList(layers)
    return SimpleNamespace(decoder=decoder, family=SimpleNamespace(kind="strange"))


def test_a_layer_reads_what_its_change_makes_while_the_block_runs() -> None:
    lmm = lmm_of(Usual(), Usual())
    layer, states = lmm.decoder.layers[1], torch.ones(1, 2, 3)

    def change(read: LayerInputs) -> LayerInputs:
        return LayerInputs(read.hidden + 1, read.mask, "cache")

    with changed_layers(lmm, {1: change}):
        for found in (layer(states), layer(hidden_states=states), layer(states, attention_mask=None)):
            assert torch.equal(found[0], states + 1) and found[1:] == (None, "cache")
        assert torch.equal(lmm.decoder.layers[0](states)[0], states)
    assert torch.equal(layer(states)[0], states)


def test_layers_without_the_usual_arguments_are_refused() -> None:
    require_usual_layers(lmm_of(Usual()))
    with pytest.raises(UserError, match=r"The decoder layers of strange \(Other\) take no past_key_values"):
        require_usual_layers(lmm_of(Other()))
    with pytest.raises(UserError, match=r"The decoder of strange has no list `layers`"):
        require_usual_layers(lmm_of())


def test_attention_without_masks_is_refused() -> None:
    require_masks("sdpa", "This is not possible")
    with pytest.raises(UserError, match="This is not possible with attention 'flash_attention_2'"):
        require_masks("flash_attention_2", "This is not possible")


def test_hidden_keys_are_left_out_of_either_kind_of_mask() -> None:
    hidden = torch.tensor([[False, True, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    assert without_keys(causal, hidden)[0, 0].tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, True],
    ]
    added = without_keys(torch.zeros(1, 1, 3, 3), hidden)
    assert added[0, 0, :, 1].eq(torch.finfo(torch.float32).min).all() and added[0, 0, :, 0].eq(0).all()
