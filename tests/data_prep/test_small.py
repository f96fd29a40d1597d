"""The projector of the recipe `small`: what it is taught by, and its training, small."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from data_prep.assemble.__main__ import app as assemble_app
from data_prep.assemble.language import Language, load_language
from data_prep.assemble.template import with_images
from data_prep.assemble.vision import Classifier
from data_prep.small.__main__ import app
from data_prep.small.align import Frozen, Row, Rows, Sequences, align, measure
from data_prep.small.classes import imagenet_names
from data_prep.small.drawings import COLORS, PLACES, SHAPES, SIDE, draw, draw_shapes
from data_prep.small.features import Pictures, drawings_of
from data_prep.small.places import Projector, Words, pushed, teach_places
from data_prep.small.questions import Ask, drawing_asks, photograph_asks
from pipeline.errors import UserError
from tests.data_prep.assembling import lite0, save_language, save_parts, save_recipe

NAMES = ["tench", "goldfish", "great white shark", "anvil"]
WIDTH = 24  # of features


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return load_language(save_language(tmp_path_factory.mktemp("language")))


@pytest.fixture
def sequences(language: Language) -> Sequences:
    return Sequences(
        language.tokenizer, with_images(language.tokenizer.chat_template, "<image>", ""), "<image>", PLACES**2
    )


@pytest.fixture(scope="module")
def head() -> Classifier:
    draw = torch.Generator().manual_seed(2)
    return Classifier(torch.randn(len(NAMES), WIDTH, generator=draw), torch.zeros(len(NAMES)))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Features from which everything can be told: noise for photographs, and each drawing's words as a code."""
    rng = torch.Generator().manual_seed(3)
    drawings, words = drawings_of(0, 20), [*COLORS, *SHAPES]
    codes = torch.rand(len(words), WIDTH, generator=rng) * 3
    maps = torch.zeros(len(drawings), PLACES**2, WIDTH)
    for number, drawing in enumerate(drawings):
        for place in range(PLACES**2):
            for word in drawing.at(place // PLACES, place % PLACES):
                if word in words:
                    maps[number, place] += codes[words.index(word)]
    return Pictures((torch.rand(20, PLACES**2, WIDTH, generator=rng) * 3).half(), maps.half(), drawings)


def test_a_drawing_is_a_function_of_its_seed_and_shows_what_it_says() -> None:
    for seed in range(12):
        drawing = draw_shapes(np.random.default_rng(seed))
        pixels = np.asarray(drawing.picture).astype(int)
        assert np.array_equal(pixels, np.asarray(draw_shapes(np.random.default_rng(seed)).picture))
        assert pixels.shape == (SIDE, SIDE, 3) and 1 <= len(drawing.things) <= 4
        for thing in drawing.things:
            left, top, right, bottom = thing.box
            inside = pixels[top:bottom, left:right].reshape(-1, 3)
            near = np.abs(inside - np.array(COLORS[thing.color])).max(1) < 60
            assert near.mean() > 0.15, (seed, thing)
    assert {bool(draw(np.random.default_rng(seed)).text) for seed in range(30)} == {True, False}


def test_answers_about_a_drawing_are_what_it_shows() -> None:
    for drawing in drawings_of(5, 40):
        said = {ask.question: ask.answer for ask in drawing_asks(np.random.default_rng(0), drawing)}
        count = next((answer for question, answer in said.items() if "shapes" in question), "")
        if drawing.text:
            assert said["What does the text say?"] == drawing.text
        else:
            assert count == ("zero", "one", "two", "three", "four")[len(drawing.things)]
        for question, answer in said.items():
            if question.startswith("Is something"):
                shown = {thing.color for thing in drawing.things} | {drawing.ground}
                assert (question.split()[2] in shown) == (answer == "Yes")


def test_a_photograph_is_asked_about_by_the_towers_own_classes() -> None:
    sure = np.array([0.9, 0.0995, 0.0, 0.0005])
    asks = photograph_asks(np.random.default_rng(0), sure, NAMES, 40)
    assert {ask.answer for ask in asks if ask.answer in NAMES} <= {"tench", "goldfish"} and len(asks) == 40
    for ask in asks:
        if ask.answer == "No":
            assert "shark" in ask.question or "anvil" in ask.question
    assert photograph_asks(np.random.default_rng(0), np.full(1000, 0.001), NAMES * 250, 5) == []


def test_branches_of_a_sequence_are_what_each_question_gives_alone(language: Language, sequences: Sequences) -> None:
    asks = [Ask("What is it?", "red"), Ask("How many things are here?", "four"), Ask("Why?", "so")]
    projector, features = Projector(WIDTH, language.width), torch.rand(PLACES**2, WIDTH)
    frozen = Frozen(language.model, sequences)
    with torch.no_grad():
        together, made = frozen.logits(projector, Row(features, asks))
        for number, ask in enumerate(asks):
            alone, single = frozen.logits(projector, Row(features, [ask]))
            torch.testing.assert_close(together[made.owner == number], alone, atol=1e-4, rtol=1e-4)
            # Alone it is an ordinary sequence, which the model itself masks.
            words = language.model.get_input_embeddings()(single.tokens)
            seen = projector(features)
            given = torch.cat([words[: single.start], seen, words[single.start + len(seen) :]])[None]
            plain = language.model(inputs_embeds=given).logits[0, single.at]
            torch.testing.assert_close(alone, plain, atol=1e-4, rtol=1e-4)
            text = language.tokenizer.decode(single.tokens)
            assert text.endswith(f"{ask.question}<|im_end|>\n<|im_start|>assistant\n{ask.answer}<|im_end|>")


def test_pushed_features_are_of_the_other_class(head: Classifier) -> None:
    features, towards = torch.rand(50, WIDTH) * 3, torch.randint(len(NAMES), (50,))
    moved = pushed(features, towards, head, 40.0)
    assert (head.probabilities(moved).argmax(1) == towards).float().mean() > 0.9
    assert moved.min() >= 0 and moved.max() <= 6


def test_words_for_places_are_learned(language: Language, head: Classifier, pictures: Pictures) -> None:
    words, target = Words(language), []
    for drawing in pictures.drawings:
        rows = [drawing.at(row, column) for row in range(PLACES) for column in range(PLACES)]
        target.append(torch.stack([words.scaled(words.of(said).mean(0)) for said in rows]))
    wanted = torch.stack(target)

    def unexplained(projector: Projector) -> float:
        with torch.no_grad():
            return float(F.mse_loss(projector(pictures.drawn.float()), wanted) / wanted.flatten(0, 1).var(0).mean())

    torch.manual_seed(0)
    projector = Projector(WIDTH, language.width)
    before = unexplained(projector)
    teach_places(projector, pictures, head, NAMES, words, 600)
    assert before > 0.9 and unexplained(projector) < 0.5


def test_the_projector_learns_through_the_frozen_model(
    language: Language, sequences: Sequences, head: Classifier, pictures: Pictures
) -> None:
    learned, held_out = pictures.split()
    assert (len(learned.drawings), len(held_out.drawings), len(held_out.photographs)) == (18, 2, 2)
    torch.manual_seed(0)
    projector, frozen = Projector(WIDTH, language.width), Frozen.of(language, sequences, torch.float32)
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}

    def loss() -> float:
        rows = Rows(learned, head, NAMES, 9)
        with torch.no_grad():
            found = [frozen.logits(projector, rows.draw()) for _ in range(20)]
        return float(torch.stack([F.cross_entropy(logits, made.wanted) for logits, made in found]).mean())

    start, saved = loss(), list[int]()
    steps = align(projector, frozen, Rows(learned, head, NAMES, 0), 60, saved.append, most=100)
    # A random language model can be moved a little only.
    assert steps == 100 and saved == [50, 100] and loss() < start - 0.15
    assert all(torch.equal(value, before[name]) for name, value in frozen.model.state_dict().items())
    shares = measure(projector, frozen, Rows(held_out, head, NAMES, 1), 2)
    assert shares.keys() >= {"photograph", "drawing"} and all(0 <= share <= 100 for share in shares.values())


def test_photographs_of_nothing_known_leave_the_drawings(head: Classifier, pictures: Pictures) -> None:
    unsure = Rows(pictures, Classifier(torch.zeros(1000, WIDTH), torch.zeros(1000)), NAMES * 250, 0)
    assert not unsure.draw("photograph").asks and not unsure.draw("pair").asks
    assert all(row.asks for row in (unsure.draw() for _ in range(10)))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((60, 40), 30 + 30 * number).convert("RGB").save(folder / f"train_{number}.jpg")
    return folder


def test_the_script_trains_a_projector_that_the_assembled_model_takes(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.small.train.imagenet_names", lambda: [f"thing {number}" for number in range(1000)])
    monkeypatch.setattr("data_prep.small.train.MEASURED", 1)
    fields = save_parts(tmp_path / "parts")
    fields["vision"]["image_size"] = 224
    recipe, out = save_recipe(tmp_path / "parts", fields), tmp_path / "parts" / "projector" / "projector.safetensors"
    arguments = ["train", str(photographs), "--like", "train_*", "--recipe", str(recipe), "--out", str(out)]
    arguments += ["--work", str(tmp_path / "work"), "--minutes", "0.01", "--place-steps", "3", "--drawings", "20"]
    torch.save(lite0(), tmp_path / "parts" / "vision" / "lite0.pth")
    result = CliRunner().invoke(app, [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["trained"])
        assert (facts["photographs"], facts["drawings"]) == (3, 20)
        assert file.get_tensor("linear_1.weight").dtype == torch.float16
    went_on = CliRunner().invoke(app, [*arguments, "--threads", "1", "--start", str(out)])
    assert went_on.exit_code == 0 and "words for places learned" not in went_on.output, went_on.output
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["trained"])
        assert (facts["start"], facts["place_steps"]) == ("projector.safetensors", 0)
    (tmp_path / "other.safetensors").write_bytes(save({"linear_1.weight": torch.zeros(2, 2)}))
    refused = CliRunner().invoke(app, [*arguments, "--start", str(tmp_path / "other.safetensors")])
    assert refused.exit_code == 2 and "is no projector for these parts" in refused.output
    assert "features of 3 photographs" in result.output and len(list((tmp_path / "work").glob("features-*"))) == 1
    made = CliRunner().invoke(assemble_app, [str(recipe), "--out", str(tmp_path / "model")])
    assert made.exit_code == 0, made.output
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "model").config.image_seq_length == 49


def test_without_the_names_of_the_classes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("data_prep.small.classes.distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps timm==1\.0\.31"):
        imagenet_names()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--like": "*.tiff"}, "There are no files .*tiff in"),
        ({"--recipe": "nothing"}, "There is no recipe 'nothing'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_on_is_one_sentence(photographs: Path, change: dict[str, str], sentence: str) -> None:
    options = [word for pair in change.items() for word in pair]
    result = CliRunner().invoke(app, ["train", str(photographs), *options])
    assert result.exit_code == 2 and re.search(sentence, result.output), result.output
