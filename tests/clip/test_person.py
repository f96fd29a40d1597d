"""Images of one's own that a person labels: ask.csv, exit code 75, and the classifier that comes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.check.clip import check_benchmark
from pipeline.cli.commands import app
from pipeline.clip.active import ask_files
from pipeline.clip.recipe import clip_recipe
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER, UserError
from pipeline.files.atomic import sha256
from tests.clip.people import CLASSES, asked, fill_in, recipe_fields, save_photos, write
from tests.clip.project import make_project, said, save_model
from tests.processes import RANK_VARIABLES, program


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def recipe_at(folder: Path, photos: Path, name: str = "photos", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(folder, photos, name, **changes)))
    return path


def run(recipe: Path) -> Any:
    """`run` as a process of its own does it: without the place of an earlier call among its ranks."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert "Traceback" not in done.output
    return done


def test_three_rounds_of_answers_end_with_a_classifier_that_predict_uses(folder: Path) -> None:
    photos = folder / "photos"
    truth = save_photos(photos)
    recipe, at = recipe_at(folder, photos), folder / "runs" / "photos"
    seen: list[str] = []
    for number in (1, 2, 3):
        done = run(recipe)
        assert done.exit_code == EXIT_RESUMABLE
        assert f"Round {number} of 3 of coop-photos-s1 waits for the class of 5 of 5 images" in done.stderr
        rows = asked(at)
        assert [row["label"] for row in rows] == [""] * 5 and [row["number"] for row in rows] == list("12345")
        assert not set(seen) & {row["image"] for row in rows}
        with Image.open(at / "ask" / "sheet-01.jpg") as sheet:
            assert min(sheet.size) > 200
        for row in rows:
            with (
                Image.open(at / "ask" / f"{int(row['number']):04d}.jpg") as small,
                Image.open(photos / row["image"]) as whole,
            ):
                assert small.size == whole.size
        seen += [row["image"] for row in fill_in(at, truth)]
    done = run(recipe)
    assert done.exit_code == EXIT_OK, done.output
    assert "labels paid" in done.stdout and "15" in done.stdout
    assert not (at / "ask.csv").exists() and not (at / "ask").exists()
    assert ask_files.read_labels(at, "photos", CLASSES) == {image: truth[image] for image in seen}
    (line,) = json.loads((at / "results.json").read_text())["lines"]
    assert (line["groups"], line["area"], line["paid"]) == ({}, None, [5, 10, 15])
    assert "There are no test images, so no accuracy is known" in (at / "report.html").read_text()
    learned = json.loads((at / "units/coop-photos-s1/rounds/03/selection.json").read_text())
    assert learned["labels"] == [CLASSES.index(truth[image]) for image in learned["images"]]
    image = str(photos / seen[0])
    answer = CliRunner().invoke(app, ["predict", str(at), "--image", image, "--json"])
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["answer"] in CLASSES and found["unit"] == "coop-photos-s1"
    assert set(found["probabilities"]) == set(CLASSES) and abs(sum(found["probabilities"].values()) - 1) < 1e-3
    assert run(recipe).exit_code == EXIT_OK  # nothing is asked again


def test_answers_that_are_missing_are_waited_for_and_the_others_stay(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos"), folder / "runs" / "photos"
    run(recipe)
    rows, place = fill_in(at, truth, but=2), at / "units" / "coop-photos-s1.unfinished" / "rounds" / "01"
    selection = (place / "asked.json").read_text()
    done = run(recipe)
    assert done.exit_code == EXIT_RESUMABLE and "waits for the class of 2 of 5 images" in done.stderr
    assert [row["label"] for row in asked(at)] == [row["label"] for row in rows]
    assert not (place / "selection.json").exists()
    assert (place / "asked.json").read_text() == selection
    rows[0]["label"] = "gren square"
    write(at, rows)
    done = run(recipe)
    assert done.exit_code == EXIT_USER and "Did you mean 'green square'?" in done.stderr
    assert asked(at)[0]["label"] == "gren square", "the person's file was changed"


def test_an_image_of_none_of_the_classes_is_paid_and_not_learned_from(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos", active={"rounds": 2}), folder / "runs" / "photos"
    run(recipe)
    first = asked(at)[0]["image"]
    fill_in(at, {**truth, first: "-"})
    run(recipe)
    assert first not in [row["image"] for row in asked(at)]
    fill_in(at, truth)
    assert run(recipe).exit_code == EXIT_OK
    (unit,) = json.loads((at / "results.json").read_text())["units"]
    assert [(facts["labels"], facts["paid"]) for facts in unit["rounds"]] == [(4, 5), (9, 10)]
    assert json.loads((at / "units/coop-photos-s1/meta.json").read_text())["images"] == 9


def test_a_round_without_any_class_learns_nothing_and_says_so(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos"), folder / "runs" / "photos"
    run(recipe)
    fill_in(at, dict.fromkeys(truth, "-"))
    done = run(recipe)
    assert done.exit_code == EXIT_USER and "has no image of any class after round 1" in done.stderr


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_ask_once_end_with_75_and_learn_what_one_learns(folder: Path) -> None:
    """By the launcher as a user starts it: its exit code is that of the ranks, and both get the person's answers."""
    truth = save_photos(folder / "photos")
    alone, at_one = recipe_at(folder, folder / "photos", "one", active={"rounds": 2}), folder / "runs" / "one"
    two = recipe_at(folder, folder / "photos", "two", active={"rounds": 2}, train={"processes": 2})
    at = folder / "runs" / "two"
    for number in (1, 2):
        assert run(alone).exit_code == EXIT_RESUMABLE
        done = program(folder, "run", str(two))
        assert done.returncode == EXIT_RESUMABLE, done.stdout + done.stderr
        assert (done.stdout + done.stderr).count(f"Round {number} of 2 of coop-photos-s1 waits for") == 1
        assert [row["image"] for row in asked(at)] == [row["image"] for row in asked(at_one)]
        fill_in(at, truth)
        fill_in(at_one, truth)
    assert run(alone).exit_code == EXIT_OK
    assert program(folder, "run", str(two)).returncode == EXIT_OK
    learned = [load_file(place / "units/coop-photos-s1/prompts.safetensors") for place in (at, at_one)]
    assert learned[0].keys() == learned[1].keys()
    for name, value in learned[0].items():
        torch.testing.assert_close(value, learned[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_second_unit_asks_only_for_what_is_not_labelled_yet(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    rows = [{"name": name, "method": "coop", "options": {"length": 2}, "acquire": "random"} for name in ("one", "two")]
    recipe = recipe_at(folder, folder / "photos", methods=rows, active={"rounds": 1})
    at = folder / "runs" / "photos"
    run(recipe)
    fill_in(at, truth)
    assert run(recipe).exit_code == EXIT_OK  # the same seed draws the same images, so nobody is asked again
    files = [at / "units" / f"{name}-photos-s1" / "rounds" / "01" / "selection.json" for name in ("one", "two")]
    assert len({str(json.loads(file.read_text())["labels"]) for file in files}) == 1


@pytest.mark.parametrize("killed", ["keep_labels", "remove_question", "write_answers"])
def test_a_kill_between_two_files_loses_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos"), folder / "runs" / "photos"
    if killed != "write_answers":
        run(recipe)
        fill_in(at, truth)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ask_files, killed, kill)
        CliRunner().invoke(app, ["run", str(recipe)])
    if killed == "write_answers":
        assert not (at / "ask.csv").exists()
        assert "Round 1 of 3" in run(recipe).stderr and len(asked(at)) == 5
    else:
        assert "Round 2 of 3" in run(recipe).stderr
        assert len(ask_files.read_labels(at, "photos", CLASSES)) == 5


@pytest.mark.slow
def test_answers_of_a_lost_question_are_used_and_those_of_another_one_kept_aside(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos"), folder / "runs" / "photos"
    run(recipe)
    fill_in(at, truth)
    shutil.rmtree(at / "ask")
    assert "Round 2 of 3" in run(recipe).stderr
    other = "image,label\nelsewhere.jpg,red square\n"
    (at / "ask.csv").write_text(other)
    (at / "ask" / "ask.json").unlink()
    assert run(recipe).exit_code == EXIT_RESUMABLE
    assert (at / "ask-earlier-1.csv").read_text() == other
    assert (at / "ask" / "ask.json").is_file() and len(asked(at)) == 5


@pytest.mark.slow
def test_labelled_test_images_are_scored_and_not_asked_about(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    for place, name in enumerate(CLASSES):
        (folder / "photos" / "known" / name).mkdir(parents=True)
        source = next(image for image, found in truth.items() if found == name)
        shutil.copy(folder / "photos" / source, folder / "photos" / "known" / name / f"{place}{Path(source).suffix}")
    entry = {"name": "photos", "layout": "unlabelled", "folder": ".", "classes": list(CLASSES), "test": "known"}
    recipe, at = recipe_at(folder, folder / "photos", data={"datasets": [entry]}), folder / "runs" / "photos"
    for _ in range(3):
        run(recipe)
        assert not [row for row in asked(at) if row["image"].startswith("known")]
        fill_in(at, truth)
    assert run(recipe).exit_code == EXIT_OK
    (line,) = json.loads((at / "results.json").read_text())["lines"]
    assert list(line["groups"]) == ["round1", "round2", "round3"] and line["area"] is not None


def test_a_person_answers_for_a_labelled_dataset_too_and_its_labels_are_not_read(folder: Path) -> None:
    make_project(folder / "project")
    entry = {"name": "toys", "layout": "split_zhou", "images": "images", "split": "split_zhou_toys.json"}
    data = {"datasets": [entry], "root": str(folder / "project" / "data")}
    recipe, at = recipe_at(folder, folder, "toys", data=data, active={"rounds": 1}), folder / "runs" / "toys"
    run(recipe)
    fill_in(at, {row["image"]: "church" for row in asked(at)})
    assert run(recipe).exit_code == EXIT_OK
    selection = json.loads((at / "units/coop-toys-s1/rounds/01/selection.json").read_text())
    assert set(selection["labels"]) == {4}  # church, whatever the split says


def test_odd_files_of_a_phone(folder: Path) -> None:
    photos = folder / "photos"
    truth = save_photos(photos)
    sideways = Image.new("RGB", (40, 20), (200, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(photos / "sideways.jpg", exif=exif)
    for name in (".hidden.jpg", "._IMG_0001.JPG", "movie.mov", "notes.txt", ".thumbnails/1.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"nothing")
    recipe, at = (
        recipe_at(folder, photos, active={"rounds": 1, "labels_per_round": 25, "candidates": 1}),
        folder / "runs/photos",
    )
    run(recipe)
    images = {row["image"]: int(row["number"]) for row in asked(at)}
    assert set(images) == {*truth, "sideways.jpg"}
    with Image.open(at / "ask" / f"{images['sideways.jpg']:04d}.jpg") as picture:
        assert picture.size == (20, 40)
    assert len(list((at / "ask").glob("sheet-*.jpg"))) == 1


def test_a_damaged_image_is_named_and_can_be_left_out(folder: Path) -> None:
    save_photos(folder / "photos")
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    recipe = recipe_at(folder, folder / "photos")
    sentence = said("run", str(recipe))
    assert "broken.jpg" in sentence and "--skip-bad 1" in sentence
    done = CliRunner().invoke(app, ["run", str(recipe), "--skip-bad", "1"])
    assert done.exit_code == EXIT_RESUMABLE, done.output
    assert "broken.jpg" not in [row["image"] for row in asked(folder / "runs" / "photos")]


def test_images_that_come_later_do_not_change_a_pool_that_is_being_labelled(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    recipe, at = recipe_at(folder, folder / "photos"), folder / "runs" / "photos"
    run(recipe)
    fill_in(at, truth)
    before = sha256(at / "ask.csv")
    Image.new("RGB", (30, 30)).save(folder / "photos" / "later.png")
    refused = run(recipe)
    assert refused.exit_code == EXIT_USER and "has changed, and" in refused.stderr
    assert sha256(at / "ask.csv") == before
    (folder / "photos" / "later.png").unlink()
    assert "Round 2 of 3" in run(recipe).stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"active": {"oracle": "labels"}}, "photos have no labels that active.oracle: labels could read"),
        ({"methods": [{"name": "coop", "acquire": "all"}]}, "takes all labels of the training split at once"),
        ({"methods": ["zero_shot"]}, "learns nothing, and photos has no test images to score it on"),
        ({"data": {"protocol": "all_classes"}, "active": None}, "have no labels, which all_classes needs"),
        ({"data": {"datasets": [{"name": "photos", "layout": "unlabelled", "classes": ["cat"]}]}}, "classes"),
        ({"data": {"datasets": [{"name": "photos", "layout": "unlabelled", "classes": ["cat", "-"]}]}}, "a class '-'"),
        (
            {"data": {"datasets": [{"name": "photos", "layout": "unlabelled", "classes": ["a", "a"]}]}},
            "every class once",
        ),
        (
            {"data": {"datasets": [{"name": "photos", "layout": "class_folders", "classes": ["a", "b"]}]}},
            "belong to the",
        ),
        ({"data": {"datasets": [{"name": "photos", "layout": "class_folders", "test": "t"}]}}, "belong to the layout"),
    ],
)
def test_contradictions_of_a_recipe_are_said(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    fields = recipe_fields(tmp_path, tmp_path)
    for group, value in changes.items():
        fields[group] = {**fields[group], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=sentence):
        clip_recipe(fields, "wrong")


def test_check_says_what_is_wrong_with_the_folder_before_anything_is_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = folder / "photos"
    entry: dict[str, Any] = {"name": "photos", "layout": "unlabelled", "folder": "."}
    recipe = recipe_at(folder, photos, data={"datasets": [entry]})

    def problem() -> str:
        return str(check_benchmark(str(recipe), []).problems.get("data", ""))

    assert "the folder" in problem() and "is missing" in problem()
    photos.mkdir()
    assert "no class names: there is no" in problem() and "classes.txt" in problem()
    (photos / "classes.txt").write_text("red square\n")
    assert "holds 1 class names, expected two or more" in problem()
    (photos / "classes.txt").write_text("red square\nRed_Square\n")
    assert "holds no images" in problem()
    save_photos(photos)
    assert "are one text to CLIP" in problem()
    (photos / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    assert "3 rounds of 9 labels are more than the 24 images" in str(
        check_benchmark(str(recipe), ["active.labels_per_round=9"]).problems["data"]
    )
    assert not problem()
    recipe_at(folder, photos, data={"datasets": [{**entry, "test": "known"}]})
    assert "there is no folder" in problem()
    (photos / "known" / CLASSES[0]).mkdir(parents=True)
    shutil.copy(next(photos.glob("*/*.png")), photos / "known" / CLASSES[0] / "1.png")
    assert "has no images of class" in problem()


@pytest.mark.slow
def test_what_predict_refuses(folder: Path) -> None:
    truth = save_photos(folder / "photos")
    rows = [{"name": name, "method": "coop", "options": {"length": 2}, "acquire": "random"} for name in ("one", "two")]
    recipe = recipe_at(folder, folder / "photos", methods=rows, active={"rounds": 1})
    at, image = folder / "runs" / "photos", str(folder / "photos" / next(iter(truth)))
    run(recipe)
    assert "has no finished unit" in said("predict", str(at), "--image", image)
    fill_in(at, truth)
    run(recipe)
    assert "choose one with --unit: one-photos-s1, two-photos-s1" in said("predict", str(at), "--image", image)
    assert "Did you mean 'two-photos-s1'" in said("predict", str(at), "--image", image, "--unit", "tow-photos-s1")
    assert "give it with --image FILE" in said("predict", str(at))
    assert "--question means nothing" in said("predict", str(at), "--image", image, "--question", "what?")
    (folder / "text.jpg").write_text("no image")
    assert "is not a readable image" in said(
        "predict", str(at), "--image", str(folder / "text.jpg"), "--unit", "one-photos-s1"
    )
    other = save_model(folder / "other", seed=1)
    sentence = said("predict", str(at), "--image", image, "--unit", "one-photos-s1", "--clip", str(other))
    assert "was trained with another base model" in sentence
