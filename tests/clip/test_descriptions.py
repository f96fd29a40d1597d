"""Descriptions of classes in a run: what is averaged, what a checkpoint keeps, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.benchmark import prepare_benchmark
from pipeline.check.clip import check_benchmark
from pipeline.clip.benchmark.classify import classify
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods import make_learner
from pipeline.clip.recipe import ClipRecipe, clip_recipe
from pipeline.clip.towers.backbone import Backbone
from pipeline.errors import UserError
from tests.clip.project import NAMES, fields, make_project
from tests.clip.tiny import byte_tokenizer, clip_model, images

LISTS = {"Red Panda": ["red fur", "a striped tail"], "golf  ball": ["dimples"]} | {
    name: [f"kind {name}", f"sort {name}", "small"] for name in NAMES[2:]
}
COOP: dict[str, Any] = {"method": "coop", "options": {"length": 2}, "train": {"augment": "none"}, "acquire": "badge"}


def described(mode: Any = "features", lists: Any = LISTS) -> Descriptions:
    return Descriptions.of_lists(mode, lists, "file.json")


def classifier(mode: str | None, **options: Any) -> PromptedCLIP:
    backbone = Backbone(clip_model())
    words = backbone.words(byte_tokenizer())
    learner = make_learner("coop", backbone, words, length=2, **options)
    return PromptedCLIP(backbone, learner, words, NAMES, descriptions=None if mode is None else described(mode))


def test_names_are_found_whatever_their_capitals_blanks_and_underscores() -> None:
    texts = described().described(NAMES)
    assert texts[:3] == ["red panda, which is/has red fur", "red panda, which is/has a striped tail", texts[2]]
    assert texts[2] == "golf ball, which is/has dimples" and len(texts) == 3 + 3 * 4


def test_averages_are_those_of_each_text_alone() -> None:
    """Features: means of unnormalised features; logits: means of logits; each from a classifier over the texts."""
    counts = [len(texts) for texts in described().of(NAMES)]
    alone = classifier(None)
    alone.set_classes(described().described(NAMES))
    pixels = images()
    with torch.no_grad():
        each, scores = alone.text_features(), alone.logits(pixels)
        means = torch.stack([part.mean(dim=0) for part in each.split(counts)])
        wanted = alone.backbone.logits(alone.image_features(pixels), means)
        torch.testing.assert_close(classifier("features").logits(pixels), wanted, atol=1e-5, rtol=0)
        wanted = torch.stack([part.mean(dim=1) for part in scores.split(counts, dim=1)], dim=1)
        torch.testing.assert_close(classifier("logits").logits(pixels), wanted, atol=1e-5, rtol=0)


def test_a_context_of_its_own_for_each_description_learns_apart() -> None:
    module = classifier("logits", classes=15)
    ctx = module.learner.get_parameter("ctx")
    module.logits(images())[:, 0].sum().backward()
    assert ctx.grad is not None
    touched = ctx.grad.abs().amax(dim=(1, 2)) > 0
    assert touched.tolist() == [True, True, *[False] * 13]  # those of the first class alone
    with pytest.raises(UserError, match="a context for each of 6 descriptions, but the class list has 15"):
        classifier("logits", classes=6)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (["red fur"], "holds no object; expected lists of texts by class name"),
        ({**LISTS, "tench": "long"}, "has no list of texts for 'tench'"),
        ({**LISTS, "tench": ["long", " "]}, "has no list of texts for 'tench'"),
        ({**LISTS, "tench": ["long", 3]}, "has no list of texts for 'tench'"),
        ({**LISTS, "tench": []}, "has an empty list for 'tench'"),
        ({**LISTS, "Tench": ["long"]}, "has 'Tench' twice in other capitals"),
        ({name: texts for name, texts in LISTS.items() if name != "tench"} | {"tensch": ["long"]}, "mean 'tensch'"),
    ],
)
def test_lists_that_cannot_be_used_are_refused_in_one_sentence(lists: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        described(lists=lists).of(NAMES)
    assert said in str(refused.value)


def make(folder: Path, tmp_path: Path, *methods: Any, **changes: Any) -> ClipRecipe:
    active = {"rounds": 2, "labels_per_round": 4, "candidates": 0.5}
    data = {"protocol": "active", "shots": None}
    base = {"seeds": [1], "run_dir": str(tmp_path / "run"), "data": data, "active": active, **changes}
    return clip_recipe(fields(folder, *methods, **base), "described")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    prepare_benchmark(make(folder, folder, {"name": "coop", **COOP}), progress=False)
    (folder / "toys.json").write_text(json.dumps(LISTS))
    return folder


def row(folder: Path, mode: str, **changes: Any) -> dict[str, Any]:
    return {"name": mode, **COOP, "descriptions": {"file": f"{folder}/{{dataset}}.json", "mode": mode}, **changes}


def test_a_run_learns_with_descriptions_and_its_checkpoint_needs_no_file(folder: Path, tmp_path: Path) -> None:
    guided = row(folder, "features", acquire="class_guided", free_labels=True)
    recipe = make(folder, tmp_path, row(folder, "logits", per_class=True, balance="pcb"), guided)
    run_benchmark(recipe)
    units = {mode: recipe.run_path / "units" / f"{mode}-toys-s1" for mode in ("logits", "features")}
    meta = json.loads((units["logits"] / "meta.json").read_text())
    assert meta["options"]["classes"] == 15 and meta["described"]["texts"]["red_panda"] == LISTS["Red Panda"]
    result = json.loads((units["logits"] / "result.json").read_text())
    (folder / "toys.json").rename(folder / "away.json")
    try:
        picture = folder / "data" / "toys" / "images" / "test-0-0.png"
        assert set(classify(recipe.run_path, picture, "logits-toys-s1")["probabilities"]) <= set(NAMES)
        with pytest.raises(UserError, match=r"toys\.json cannot be read"):
            run_benchmark(recipe)
        (folder / "toys.json").write_text(json.dumps({**LISTS, "tench": ["long"]}))
        with pytest.raises(UserError, match="was trained with another descriptions"):
            run_benchmark(recipe)
    finally:
        (folder / "away.json").rename(folder / "toys.json")
    run_benchmark(recipe)
    assert json.loads((units["logits"] / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "zero_shot", "method": "zero_shot", "options": {}, "train": {}, "acquire": None}, "learns nothing"),
        ({"name": "cocoop", "method": "cocoop"}, "other text features for each image, which descriptions"),
        ({"consistency": {}}, "set the mode to features"),
        ({"method": "kgcoop"}, "set the mode to features"),
        ({"descriptions": {"file": "a.json", "mode": "mean"}}, "descriptions.mode"),
    ],
)
def test_rows_that_cannot_use_descriptions_are_refused(folder: Path, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(folder, tmp_path, {**row(folder, "logits"), **change})


def test_descriptions_belong_to_the_protocol(folder: Path) -> None:
    with pytest.raises(UserError, match="logits has acquire, descriptions, which belong to the protocol active"):
        clip_recipe(fields(folder, row(folder, "logits")), "wrong")


def test_check_says_what_is_wrong_with_the_file(folder: Path, tmp_path: Path) -> None:
    file, given = tmp_path / "recipe.yaml", tmp_path / "toys.json"
    file.write_text(yaml.safe_dump(make(folder, tmp_path, row(tmp_path, "logits")).model_dump(mode="json")))

    def problem() -> str:
        return str(check_benchmark(str(file), []).problems.get("descriptions", ""))

    assert "cannot be read (No such file or directory)" in problem()
    given.write_text("{")
    assert "is not JSON" in problem()
    given.write_text('{"tench": ["long"], "tench": ["short"]}')
    assert "'tench' stands" in problem()
    given.write_text(json.dumps({name: LISTS[name] for name in NAMES[2:]}))
    assert "describes no class 'red panda' (2 such classes)" in problem()
    given.write_text(json.dumps({**LISTS, "tench": ["long " * 80]}))
    assert "tokens, the text tower reads" in problem()
    given.write_text(json.dumps(LISTS))
    assert not problem()
