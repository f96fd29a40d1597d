"""Prompts of every layer: what they compute, what depth 1 is, how many there are, and answers with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.prompt_schedule import LayerSchedule, Op, grown
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, StageData, collate
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.insertion import insertion_place
from pipeline.prompts.learner import Learner, prompt_learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.deep_rows import DeepEntry, DeepRows
from pipeline.prompts.parts.input_rows import InputRows, RowsEntry
from pipeline.prompts.parts.shapes import DecoderShape
from pipeline.prompts.terms import PrototypeTerm
from pipeline.training.normaliser import Normaliser
from tests import tiny
from tests.prompts.deep_reference import hidden_of
from tests.training.worlds import KEY_WIDTH, make_samples

LAYERS = 4
SCHEDULES = {
    "replaced in every layer": grown(3, 1, 3, 4),
    "replaced in two layers, then carried": grown(3, 1, 3, 2),
    "added and carried": grown(2, 1, 0, 3),
    "modular": grown(2, 2, 1, 4),
    "modular, as in the figure": grown(2, 2, 3, 3, "figure"),
    "removed for good": [Op(add=3), Op(remove=2), Op(remove=1, add=1)],
}
# Samples with a set before the own one, two sets with weights, none, and one.
SELECTION = Selection(
    torch.tensor([[1, -1], [0, 1], [-1, -1], [1, -1]]), torch.tensor([[1.0, 0.0], [0.5, 0.25], [0.0, 0.0], [2.0, 0.0]])
)
INSERTIONS = ("after_bos", "before_image", "after_image")


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> LMM:
    folder = tmp_path_factory.mktemp("deep") / "llava"
    folder.mkdir()
    return load_lmm(ModelConfig(path=str(tiny.save_llava(folder, layers=LAYERS))))


def batch_of(lmm: LMM, selection: Selection = SELECTION) -> Batch:
    data = StageData([(*make_samples(4, text_only=(1,)), None)])
    return collate(Examples(data, lmm.conversation, "image"), range(4), [1.0] * 4, selection)


def modules_of(part: DeepRows, count: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *value.shape, generator=generator) * 0.4 for name, value in part.trainables().items()
    }


def rows_of(tensors: dict[str, Tensor], weight: float, ops: list[Op]) -> list[Tensor | None]:
    """One module's rows of each layer."""
    names = ["prompt", *(f"deep.{block}" for block in range(1, len(ops)))]
    return [weight * tensors[name] if name in tensors else None for name in names]


def reference_loss(
    lmm: LMM, batch: Batch, bank: dict[str, Tensor], own: dict[str, Tensor], ops: list[Op], insertion: str
) -> Tensor:
    """The summed cross-entropy of the answers, a sample at a time."""
    images = dict(batch.images)
    total = torch.zeros(())
    pictured = 0
    for sample in range(len(batch.input_ids)):
        kept = batch.attention[sample].bool()
        ids, labels = batch.input_ids[sample][kept], batch.labels[sample][kept]
        has_image = batch.has_image[sample : sample + 1]
        mine = {"pixel_values": images["pixel_values"][pictured : pictured + 1]} if has_image.any() else images
        pictured += int(has_image.any())
        tokens = lmm.embed(ids[None], mine, has_image)[0]
        spans = lmm.image_spans(lmm.image_places(ids[None]))
        at = int(insertion_place(torch.ones_like(ids)[None], spans, insertion))
        chosen = [({name: value[n] for name, value in bank.items()}, w) for n, w in batch.selection.chosen(sample)]
        modules = [rows_of(tensors, weight, ops) for tensors, weight in [*chosen, (own, 1.0)]]
        logits = lmm.logits(hidden_of(lmm, tokens, at, modules, ops))
        total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("insertion", INSERTIONS)
def test_loss_and_gradients_are_those_of_layers_computed_one_by_one(lmm: LMM, name: str, insertion: str) -> None:
    ops = list(SCHEDULES[name])
    part = DeepRows(lmm, LayerSchedule(tuple(ops)), insertion)
    learner = Learner({"module": part})
    own = {key: value[0] for key, value in modules_of(part, 1, seed=9).items()}
    bank = modules_of(part, 2)
    for key, parameter in learner.trainables().items():
        parameter.data.copy_(own[key])
    learner.start_stage(bank)
    batch = batch_of(lmm)
    wanted = {key: value.clone().requires_grad_() for key, value in own.items()}
    expected = reference_loss(lmm, batch, bank, wanted, ops, insertion)
    expected.backward()
    for policy in ("none", "selective", "full"):
        learner.zero_grad()
        loss, _ = LearnerOnLMM(lmm, learner, policy)(batch, Normaliser(1, 1))
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
        for key, parameter in learner.trainables().items():
            torch.testing.assert_close(parameter.grad, wanted[key].grad, atol=1e-4, rtol=1e-3, msg=f"{policy} {key}")


def method(**fields: Any) -> Any:
    return make_method(method_options(name="modular", prompt_length=4, **fields))


def test_with_depth_1_it_is_modalprompt_bit_for_bit(lmm: LMM) -> None:
    found = []
    for part in (DeepRows.of(lmm, method(depth=1)), InputRows(lmm, 4)):
        head = ProjectionHead(lmm.width, KEY_WIDTH, dtype=lmm.dtype)
        learner = Learner({"module": part, "head": head}, [PrototypeTerm(1.0)])
        values = learner.start(lmm, 3, 1)
        for key, parameter in learner.trainables().items():
            parameter.data.copy_(values[key])
        learner.start_stage({"prompt": modules_of(DeepRows.of(lmm, method(depth=1)), 2)["prompt"]})
        loss, _ = LearnerOnLMM(lmm, learner)(batch_of(lmm), Normaliser(5, 4))
        loss.backward()
        found.append({"loss": loss.detach(), **values, **{f"{k}'": p.grad for k, p in learner.trainables().items()}})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    plain = prompt_learner(lmm, 4, KEY_WIDTH).start(lmm, 3, 1)
    assert all(torch.equal(value, plain[key]) for key, value in plain.items())


@pytest.mark.parametrize(
    ("fields", "present", "fresh"),
    [
        ({"depth": 4}, (4, 4, 4, 4), {1: 4, 2: 4, 3: 4}),
        ({"depth": 3, "add": 2, "remove": 3}, (4, 9, 14), {1: 8, 2: 8}),
        ({"depth": 3, "add": 2, "remove": 8, "first": "figure"}, (8, 8, 8), {1: 8, 2: 8}),
        ({"depth": 2, "remove": 0}, (4, 8), {1: 4}),
    ],
)
def test_numbers_of_rows_follow_the_schedule(
    lmm: LMM, fields: dict[str, Any], present: tuple[int, ...], fresh: dict[int, int]
) -> None:
    """p_0 = n (or a n), p_b = p_(b-1) - r + a n, docs/design.md 5.4."""
    made = method(**fields)
    part = DeepRows.of(lmm, made)
    assert part.schedule.present == present
    assert DeepRows.length(made) == max(present)
    assert {int(block): len(layer.get_parameter("rows")) for block, layer in part.layers.items()} == fresh
    trained = sum(value.numel() for value in part.trainables().values())
    assert trained == (present[0] + sum(fresh.values())) * lmm.width
    assert sum(DeepRows.sizes(made, DecoderShape(lmm.model.config.text_config))) == trained


def test_the_first_step_is_that_of_the_set_alone(lmm: LMM) -> None:
    losses = []
    for part in (DeepRows.of(lmm, method(depth=4)), InputRows(lmm, 4)):
        learner = Learner({"module": part})
        values = learner.start(lmm, 0, 0)
        for key, parameter in learner.trainables().items():
            parameter.data.copy_(values[key])
        losses.append(LearnerOnLMM(lmm, learner)(batch_of(lmm, Selection.none(4)), Normaliser(1, 1))[0].detach())
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("insertion", INSERTIONS)
def test_answers_with_a_cache_are_those_of_layers_computed_one_by_one(lmm: LMM, name: str, insertion: str) -> None:
    ops = list(SCHEDULES[name])
    schedule = LayerSchedule(tuple(ops))
    tensors = modules_of(DeepRows(lmm, schedule, insertion), 3)
    samples, keys = make_samples(4, text_only=(1,))
    sharing: Any = "image" if insertion == "after_image" else "none"
    examples = Examples(StageData([(samples, keys, None)]), lmm.conversation, sharing)
    selection = Selection(
        torch.tensor([[1, -1], [0, 2], [-1, -1], [2, 1]]), torch.tensor([[1.0, 0], [0.5, 0.3], [0, 0], [1.0, 1.0]])
    )
    modules = Modules(tensors, selection, DeepEntry(insertion, schedule))
    found = generate_answers(lmm, examples, range(4), modules, Decoding(5, 3))
    for sample in range(4):
        batch = collate(examples, [sample], [1.0], selection, with_answer=False)
        tokens = lmm.embed(batch.input_ids, batch.images, batch.has_image)[0]
        spans = lmm.image_spans(lmm.image_places(batch.input_ids))
        at = int(insertion_place(batch.attention, spans, insertion))
        chosen = [rows_of({k: v[n] for k, v in tensors.items()}, w, ops) for n, w in selection.chosen(sample)]
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 5 and not set(answer) & set(lmm.stops):
                words = [lmm.words(torch.tensor(answer))] if answer else []
                states = hidden_of(lmm, torch.cat([tokens, *words]), at, chosen, ops)
                answer.append(int(lmm.logits(states[-1]).argmax()))
        assert found[sample] == lmm.conversation.decode(answer), sample


def test_a_schedule_that_cannot_be_is_refused(lmm: LMM) -> None:
    with pytest.raises(UserError, match=r"depth of 5 reaches beyond the decoder, which has 4 layers"):
        DeepRows.of(lmm, method(depth=5))
    with pytest.raises(UserError, match=r"Layer 1 of the decoder would remove 5 prompts, but only 4 are there"):
        DeepRows.of(lmm, method(depth=2, remove=5))


def test_images_may_be_shared_only_where_the_rows_stand_behind_them() -> None:
    schedule = LayerSchedule(tuple(grown(2, 1, 2, 2)))
    assert DeepEntry("after_bos", schedule).changes_images and not DeepEntry("after_image", schedule).changes_images
    assert not RowsEntry("after_bos").changes_images
