"""What each method learns, what its terms are, and how it moves to other classes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from pipeline.clip.learning.averaging import WeightAverage, gaussian_weights
from pipeline.clip.learning.model import ImageBatch
from pipeline.clip.methods import learner_of_sizes, method_class, refuse_options
from pipeline.clip.methods.regularisers import Consistency, KnowledgeGuided
from pipeline.clip.towers.backbone import normalised
from pipeline.clip.towers.text import class_texts
from pipeline.config import registry
from pipeline.errors import UserError
from pipeline.training.normaliser import Normaliser
from tests.clip.tiny import NAMES, batch, byte_tokenizer, classifier, images


def steps(module: Any, count: int) -> None:
    optimizer = torch.optim.SGD(module.learner.parameters(), lr=0.05, momentum=0.9)
    for number in range(count):
        optimizer.zero_grad()
        module(batch(seed=number))[0].backward()
        optimizer.step()


def slot_differences(tied: bool) -> list[float]:
    """The largest difference between the two projections of each prompted block, after some steps."""
    module = classifier("mpl", length=1, add=2, remove=1, depth=3, tied=tied)
    steps(module, 20)
    first, second = module.learner.txt2img_proj  # type: ignore[misc]
    return [float((a.weight - b.weight).detach().abs().max()) for a, b in zip(first, second, strict=True)]


def test_tied_slots_of_the_last_prompted_block_never_part() -> None:
    # docs/design.md 5.6, M1: what is not removed later stays symmetrical.
    earlier, last = slot_differences(tied=True)
    assert earlier > 1e-4
    assert last < 1e-6


def test_independent_slots_differ_in_every_block() -> None:
    assert min(slot_differences(tied=False)) > 1e-2


def test_mpl_in_the_figure_gives_the_first_block_as_many_prompts_as_the_others() -> None:
    module = classifier("mpl", length=2, add=3, remove=1, depth=2, first="figure")
    prompts = module.learner()
    assert prompts.vision[0].shape[0] == prompts.vision[1].shape[0] == 6


def test_contexts_start_from_the_words_of_the_template() -> None:
    module = classifier("maple", length=2, depth=2)
    ids = module.words.first_ids("a photo of a", 2)
    assert torch.equal(module.learner.get_parameter("ctx"), module.backbone.embedding_rows(ids))


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    sizes = classifier("zero_shot").backbone.sizes
    first, same, other = (learner_of_sizes("mpl", sizes, seed, depth=3).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["ctx"], other["ctx"])


@pytest.mark.parametrize(("position", "rows"), [("end", [1, 2, 3]), ("middle", [1, 4, 5]), ("front", [3, 4, 5])])
def test_context_stands_at_the_end_in_the_middle_or_in_front(position: Any, rows: list[int]) -> None:
    words = classifier("zero_shot").words
    texts = class_texts(words, ["ab"], "xyz{}.", 3, position)
    assert texts.rows.tolist() == [rows]
    kept = [token for row, token in enumerate(texts.ids[0].tolist()) if row not in rows]
    assert kept == [256, *b"ab.", 257]


@pytest.mark.parametrize("method", ["coop", "cocoop", "maple", "mpl", "ivlp", "vpt"])
def test_prompts_move_to_another_class_list(method: str) -> None:
    options: dict[str, Any] = {"depth": 2} if method in ("maple", "mpl", "ivlp", "vpt") else {"length": 2}
    trained = classifier(method, **options)
    steps(trained, 2)
    moved = classifier(method, names=["tench", "unseen thing", "organ"], **options)
    moved.learner.load_state_dict(trained.learner.state_dict())
    pixels = images()
    with torch.no_grad():
        there, here = trained.logits(pixels), moved.logits(pixels)
    torch.testing.assert_close(here[:, [0, 2]], there[:, [2, 3]], atol=1e-5, rtol=0)


def test_a_context_for_each_class_does_not_move_to_other_classes() -> None:
    module = classifier("coop", length=2, classes=len(NAMES))
    with pytest.raises(UserError, match="a context for each of 4 classes, but the class list has 2"):
        module.set_classes(["one", "two"])


def test_a_checkpoint_holds_prompts_alone() -> None:
    module = classifier("coop", length=2)
    assert list(module.learner.state_dict()) == ["ctx"]


def test_samples_that_fill_a_batch_do_not_count() -> None:
    regularisers = [Consistency(), KnowledgeGuided()]
    module = classifier("ivlp", depth=2, regularisers=regularisers)
    real = batch(2)
    assert real.pixel_values is not None
    filled = ImageBatch(real.pixel_values[[0, 1, 1]], real.labels[[0, 1, 1]], torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(module(filled)[0], module(real)[0], atol=1e-5, rtol=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    module = classifier("ivlp", depth=2, regularisers=[Consistency(), KnowledgeGuided()])
    whole = batch(3)
    assert whole.pixel_values is not None
    parts = [
        module(ImageBatch(whole.pixel_values[a:b], whole.labels[a:b]), Normaliser(3.0, 3.0))[0]
        for a, b in ((0, 2), (2, 3))
    ]
    torch.testing.assert_close(sum(parts), module(whole)[0], atol=1e-5, rtol=1e-5)


def test_consistency_terms_are_those_of_promptsrc() -> None:
    module = classifier("ivlp", depth=2, regularisers=[Consistency(templates=["a photo of a {}.", "art of the {}."])])
    _, terms = module(batch())
    with torch.no_grad():
        model = module.backbone.model
        texts = torch.zeros(())
        for template in ("a photo of a {}.", "art of the {}."):
            ids = class_texts(module.words, NAMES, template).ids
            texts = texts + model.get_text_features(input_ids=ids).pooler_output
        texts = normalised(texts / 2)
        frozen_images = model.get_image_features(pixel_values=images()).pooler_output
        frozen = module.backbone.logits(frozen_images, texts).log_softmax(1)
        learned = module.logits(images()).log_softmax(1)
        divergence = torch.nn.functional.kl_div(learned, frozen, reduction="sum", log_target=True) / learned.numel()
        text = torch.nn.functional.l1_loss(normalised(module.text_features()), texts)
        image = torch.nn.functional.l1_loss(normalised(module.image_features(images())), normalised(frozen_images))
    torch.testing.assert_close(terms["text_consistency"], 25 * text)
    torch.testing.assert_close(terms["image_consistency"], 10 * image)
    torch.testing.assert_close(terms["logit_consistency"], divergence, atol=1e-6, rtol=1e-4)


def test_the_knowledge_term_vanishes_where_nothing_was_learned_yet() -> None:
    # The context begins as the words of the template, so the text features are the frozen ones.
    module = classifier("kgcoop", length=4, words="a ph", regularisers=[KnowledgeGuided(template="a ph {}.")])
    assert float(module(batch())[1]["knowledge"]) == pytest.approx(0.0, abs=1e-5)
    steps(module, 3)
    assert float(module(batch())[1]["knowledge"]) > 1e-4


def test_epochs_weigh_as_a_normal_density() -> None:
    weights = gaussian_weights(20, mean=15, deviation=1)
    assert sum(weights) == pytest.approx(1.0)
    assert weights.index(max(weights)) == 14
    assert weights[13] / weights[14] == pytest.approx(0.6065, abs=1e-4)
    assert gaussian_weights(2, mean=1000, deviation=1)[1] == pytest.approx(1.0)


def test_an_interrupted_average_goes_on_where_it_was() -> None:
    values = [{"ctx": torch.full((2,), float(number))} for number in range(3)]
    whole, begun, resumed = (WeightAverage(3, 2, 1) for _ in range(3))
    for value in values:
        whole.add(value)
    begun.add(values[0])
    resumed.load(begun.state())
    for value in values[1:]:
        resumed.add(value)
    assert torch.equal(resumed.average()["ctx"], whole.average()["ctx"])
    assert float(whole.average()["ctx"][0]) == pytest.approx(1.0)  # symmetrical about epoch 2


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("mapel", {}, "no method 'mapel'.*Did you mean 'maple'"),
        ("mpl", {"remov": 2}, "no option 'remov'.*Did you mean 'remove'"),
        ("coop", {"classes": 3, "words": "a photo of a"}, "cannot start from the words"),
        ("mpl", {"first": "Figure"}, "first: found 'Figure', expected one of code, figure. Did you mean 'figure'"),
        ("mpl", {"tied": "yes"}, "tied: found 'yes', expected true or false"),
        ("coop", {"position": "left"}, "position: found 'left', expected one of end, middle, front"),
        ("coop", {"position": "font"}, "Did you mean 'front'"),
        ("maple", {"length": "four"}, "length: found 'four', expected a whole number"),
        ("maple", {"depth": True}, "depth: found True, expected a whole number"),
        ("ivlp", {"words": 4}, "words: found 4, expected text"),
    ],
)
def test_unknown_methods_and_options_are_named(method: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        learner_of_sizes(method, classifier("zero_shot").backbone.sizes, **options)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "There are no classes"),
        (["cat", " "], "Class 1 has an empty name"),
        (["x" * 90], "tokens, the text tower reads 77"),
    ],
)
def test_class_lists_that_cannot_be_read_are_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        classifier("coop", names=names, length=2)


def test_every_method_takes_the_values_it_starts_with() -> None:
    for name in registry.names("clip_methods"):
        parameters = inspect.signature(method_class(name)).parameters
        refuse_options(name, {option: p.default for option, p in parameters.items() if option != "sizes"})


def test_an_unknown_position_of_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=r"position is 'middel'; expected one of end.*Did you mean 'middle'"):
        class_texts(classifier("zero_shot").words, NAMES, "xyz{}.", 3, "middel")  # type: ignore[arg-type]


def test_fewer_words_than_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="which are 2 tokens, but has 3 vectors"):
        classifier("coop", length=3, words="ab")


def test_regularisers_are_refused_where_texts_depend_on_the_image() -> None:
    with pytest.raises(UserError, match="cocoop has text features of its own for each image"):
        classifier("cocoop", regularisers=[Consistency()])


def test_the_tokenizer_of_bytes_is_one() -> None:
    assert byte_tokenizer()("aB c.")["input_ids"] == [256, *b"ab c.", 257]
