"""Low-rank updates on every architecture: each row's answer is that of the plain model with its modules merged in."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.lmm import LMM
from pipeline.data.collate import Examples, collate, collate_prompts
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry
from pipeline.training.normaliser import Normaliser
from tests.backbones.test_families import EVERY, NEW, SAMPLES, plain_answer, plain_inputs, seen
from tests.training.worlds import make_samples

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 2, 3.0
# Rows with one module, two with weights, one at half, and none.
CHOSEN = Selection(
    torch.tensor([[0, -1], [2, 1], [1, -1], [-1, -1], [2, -1], [0, 2]]),
    torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.0], [0.0, 0.0], [1.0, 0.0], [0.2, 0.8]]),
)


@pytest.fixture(scope="module")
def examples(lmm: LMM) -> Examples:
    return Examples(StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]), lmm.conversation)


def targets_of(lmm: LMM) -> tuple[str, ...]:
    """All that can be updated: the image projector only where it reads one feature for each image token."""
    return (*LINEARS, "lm_head", "embed_tokens", *["image_projector"] * (lmm.family.kind in ("llava", "fast_vlm")))


@pytest.fixture(scope="module")
def tensors(lmm: LMM) -> dict[str, Tensor]:
    """Three random modules on every linear layer of the decoder, and on what stands before and behind it."""
    generator = torch.Generator().manual_seed(11)
    trainables = LowRank(lmm, targets_of(lmm), RANK, ALPHA).trainables()
    layers = len(list(lmm.decoder.layers))  # type: ignore[arg-type]
    assert len(trainables) == 2 * (len(LINEARS) * (layers - 1) + len(targets_of(lmm)))
    return {name: torch.randn(3, *value.shape, generator=generator) * 0.5 for name, value in trainables.items()}


@contextmanager
def beside_projector(lmm: LMM, tensors: Mapping[str, Tensor], row: int) -> Iterator[None]:
    """While the block runs, the plain model's projector has a sample's modules beside it."""
    if "low_rank.image_projector.a" not in tensors:
        yield
        return
    up, down = (tensors[f"low_rank.image_projector.{end}"] for end in "ba")
    added = ALPHA / RANK * sum((share * up[n] @ down[n] for n, share in CHOSEN.chosen(row)), 0 * up[0] @ down[0])
    hook = lmm.projector().register_forward_hook(lambda _, inputs, output: output + inputs[0] @ added.T)
    yield
    hook.remove()


@torch.no_grad()
def merged_answer(lmm: LMM, tensors: Mapping[str, Tensor], row: int) -> list[int]:
    """The plain model's answer to a sample with its modules in the weights of the layers, and beside the projector."""
    names = {name.removeprefix("low_rank.")[:-2] for name in tensors} - {"image_projector"}
    layers = {name: lmm.layer(name) for name in names}
    before = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = before[name].clone()
        for number, share in CHOSEN.chosen(row):
            update = tensors[f"low_rank.{name}.b"][number] @ tensors[f"low_rank.{name}.a"][number]
            weight.add_(ALPHA / RANK * share * (update.T if name == "embed_tokens" else update))
        # A parameter of its own: the output layer's may be the input embeddings' too, which have another update.
        layer.weight = nn.Parameter(weight, requires_grad=False)
    with beside_projector(lmm, tensors, row):
        tokens = plain_answer(lmm, plain_inputs(lmm, SAMPLES[row]))
    for name, layer in layers.items():
        layer.weight = before[name]
    return tokens


def test_rows_that_join_leave_and_are_parked_keep_their_updates(
    lmm: LMM, examples: Examples, tensors: dict[str, Tensor]
) -> None:
    assert len(SAMPLES) == len(CHOSEN)
    expected = [merged_answer(lmm, tensors, row) for row in EVERY]
    frozen = [plain_answer(lmm, plain_inputs(lmm, SAMPLES[row])) for row in EVERY]
    assert frozen[3] == expected[3] and frozen != expected
    attached = functools.partial(LowRankEntry(ALPHA / RANK).attached, lmm, tensors)
    decoder, rows = GreedyDecoder[Row](lmm, attached), [Row(number, NEW - number % 3) for number in EVERY]
    for chosen in ([3], [0, 4], [1], [2, 5]):
        selection = CHOSEN.rows(torch.tensor(chosen))
        with torch.no_grad(), attached(selection):
            seen_by = seen(lmm, collate_prompts(examples, chosen, CHOSEN), None, left=True)
        decoder.join(Prompts(*seen_by, selection=selection), [rows[number] for number in chosen])
        parked = decoder.park(len(decoder.rows) // 2) if len(decoder.rows) > 1 else None
        decoder.step()
        if parked is not None:
            decoder.resume(parked)
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == [tokens[: row.longest] for row, tokens in zip(rows, expected, strict=True)]


def test_gradients_are_the_same_however_layers_are_computed(
    lmm: LMM, examples: Examples, tensors: dict[str, Tensor]
) -> None:
    found = []
    for policy in ("none", "selective", "full"):
        learner = Learner({"module": LowRank(lmm, targets_of(lmm), RANK, ALPHA)})
        for name, value in learner.trainables().items():
            value.data.copy_(tensors[name][0] * 0.3)
        learner.start_stage(tensors)
        batch = collate(examples, EVERY, [1.0] * len(SAMPLES), CHOSEN)
        loss, _ = LearnerOnLMM(lmm, learner, policy)(batch, Normaliser(*batch.counts()))
        loss.backward()
        found.append((loss.detach(), {name: value.grad for name, value in learner.trainables().items()}))
    assert all(value.grad is None for value in lmm.parameters())
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_projectors_that_join_features_are_refused(lmm: LMM) -> None:
    if "image_projector" in targets_of(lmm):
        LowRank(lmm, ("image_projector",), RANK, ALPHA)
        return
    with pytest.raises(UserError, match="'image_projector' has no inputs of the tokens' own"):
        LowRank(lmm, ("image_projector",), RANK, ALPHA)
