"""Sets behind the image: two passes give what one pass over the same layout gives, on every architecture that can."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.data.collate import Batch, Examples, collate
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.prompts.generation import Decoding, generate_answers, prompt_sets
from pipeline.prompts.insertion import insertion_place
from pipeline.prompts.model import LearnerOnLMM
from pipeline.training.normaliser import Normaliser
from tests.backbones.test_families import SAMPLES, photo
from tests.training.worlds import make_module, make_pool, make_samples

# Two questions on one picture that are not neighbours, the same question on another, and questions without one.
SHARED = SampleList(
    [
        *SAMPLES[:3],
        dataclasses.replace(
            SAMPLES[0], id="wide again", question="and how many of them are there in all?", answer="two"
        ),
        *SAMPLES[3:5],
        dataclasses.replace(SAMPLES[0], id="other picture", image=photo(60, 40, 5)),
    ]
)
EVERY = list(range(len(SHARED)))
SELECTED = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1], [2, 1], [0, 2], [1, 2]])
CANNOT = ("gemma3",)


@pytest.fixture(scope="module")
def able(lmm: LMM) -> LMM:
    if lmm.family.kind in CANNOT:
        pytest.skip("this architecture cannot, and says so: see the test of that")
    return lmm


@pytest.fixture(scope="module")
def module(able: LMM) -> LearnerOnLMM:
    torch.manual_seed(0)
    module = make_module(able, 4, "after_image")
    torch.nn.init.normal_(module.learner["module"].prompt, std=0.2)
    module.learner.start_stage(make_pool(3, width=able.width).tensors)
    return module


def examples_of(lmm: LMM, sharing: str) -> Examples:
    data = StageData([(SHARED, make_samples(len(SHARED))[1], None)])
    return Examples(data, lmm.conversation, sharing=sharing)  # type: ignore[arg-type]


def loss_and_gradient(module: LearnerOnLMM, batch: Batch) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    assert module.learner["module"].prompt.grad is not None
    return torch.stack([*terms.values()]), module.learner["module"].prompt.grad.clone()


@pytest.mark.parametrize("chosen", [EVERY, [1, 4, 5], [0, 3], [2]])
def test_loss_and_gradient_equal_those_of_one_pass(
    module: LearnerOnLMM, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(collate, indices=chosen, weights=[1.0] * len(chosen), selected=SELECTED)
    found = {kind: loss_and_gradient(module, make(examples_of(module.lmm, kind))) for kind in ("none", "image")}
    monkeypatch.setattr(LearnerOnLMM, "in_two_passes", False)
    expected = loss_and_gradient(module, make(examples_of(module.lmm, "none")))
    assert expected[1].abs().max() > 1e-3
    for result in found.values():
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_an_image_is_computed_once_for_all_questions_about_it(able: LMM) -> None:
    batch = collate(examples_of(able, "image"), EVERY, [1.0] * len(EVERY), SELECTED)
    assert batch.groups is not None and batch.leaders is not None
    assert batch.groups.tolist() == [0, 1, 2, 0, 3, 1, 4]
    assert batch.leaders.tolist() == [0, 1, 2, 4, 6]
    alone = [examples_of(able, "none")[index].images for index in (0, 2, 4, 6)]
    expected = torch.cat([images["pixel_values"] for images in alone if images is not None])
    assert torch.equal(batch.images["pixel_values"], expected)


def test_sets_stand_behind_what_ends_the_image(able: LMM) -> None:
    batch = collate(examples_of(able, "none"), EVERY, [1.0] * len(EVERY), SELECTED)
    place = insertion_place(batch.attention, able.image_spans(able.image_places(batch.input_ids)), "after_image")
    ends = {
        "qwen2_5_vl": "<|vision_end|>",
        "internvl": "</img>",
        "idefics3": "<fake_token_around_image>",
        "smolvlm": "<fake_token_around_image>",
    }
    last = able.tokenizer.convert_tokens_to_ids(ends.get(able.family.kind, "<image>"))
    for row, sample in enumerate(SHARED):
        ids = batch.input_ids[row].tolist()
        assert int(place[row]) == (1 if sample.image is None else len(ids) - ids[::-1].index(last))


@pytest.mark.parametrize("insertion", ["after_image", "after_bos", "before_image"])
def test_answers_behind_shared_beginnings_are_those_of_one_pass(able: LMM, insertion: str) -> None:
    sets = make_pool(3, width=able.width).prompts
    ask = partial(generate_answers, able, indices=EVERY, modules=prompt_sets(sets, SELECTED, insertion))
    expected = ask(examples=examples_of(able, "none"), decoding=Decoding(6, batch=1))
    sharing = "image" if insertion == "after_image" else "sets"
    for batch in (1, 3, len(EVERY)):
        assert ask(examples=examples_of(able, sharing), decoding=Decoding(6, batch)) == expected
    assert len(set(expected.values())) > 1


def test_what_cannot_be_computed_in_two_passes_is_refused_with_the_reason(lmm: LMM) -> None:
    if lmm.family.kind not in CANNOT:
        pytest.skip("this architecture can")
    with pytest.raises(UserError, match=r"after_image is not possible.*Gemma 3 has sliding-window attention"):
        make_module(lmm, 4, "after_image")
    with pytest.raises(UserError, match=r"^evaluate\.share_images: true is not possible"):
        lmm.require_two_passes("evaluate.share_images: true")
