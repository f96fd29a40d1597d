"""Preparing a benchmark: which images are written, what a second call keeps, and what is missing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.benchmark import prepare_benchmark
from data_prep.sources import colour_shapes
from pipeline.clip.benchmark.prepared import require_prepared
from pipeline.clip.images.few_shot import few_shot
from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.prepared import CLASSES_FILE, PreparedDataset
from pipeline.clip.learning.few_shot_batches import FewShotBatches, FewShotImages
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.errors import UserError
from tests.clip.project import IMAGES, NAMES, SHOTS, fields, make_project, recipe, save_dataset, split_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def prepared(folder: Path, **changes: Any) -> PreparedDataset:
    prepare_benchmark(recipe(folder, "coop", **changes), progress=False)
    return PreparedDataset(folder / "prepared" / "toys")


def test_training_shards_hold_what_the_seeds_draw_and_no_more(folder: Path) -> None:
    from data_prep.sources.split_zhou import read_split_file

    data = prepared(folder)
    splits = read_split_file(split_file(folder / "data"))
    drawn = {seed: few_shot(splits, SHOTS, seed).train for seed in (1, 2)}
    assert data.train is not None
    assert set(data.train.ids) == {image.path for images in drawn.values() for image in images}
    for seed, images in drawn.items():
        shots = data.few_shots(seed, "all")
        assert [(data.train.ids[row], label) for row, label in zip(shots.rows, shots.labels, strict=True)] == [
            (image.path, image.label) for image in images
        ]
    assert data.test is not None and len(data.test) == len(NAMES) * IMAGES["test"]


def test_halves_count_from_zero_and_never_share_an_image(folder: Path) -> None:
    data = prepared(folder)
    base, new = data.test_images("base"), data.test_images("new")
    assert data.test is not None
    assert (base.names, new.names) == (NAMES[:3], NAMES[3:])
    assert set(base.labels) == set(new.labels) == {0, 1, 2}
    assert not set(base.rows) & set(new.rows)
    assert len(data.few_shots(1, "base").rows) == 3 * SHOTS
    assert [data.test[row].meta["label"] - 3 for row in new.rows] == list(new.labels)


def test_a_second_call_writes_nothing_and_another_seed_takes_none_away(folder: Path) -> None:
    first = prepared(folder, seeds=[1])
    again = prepare_benchmark(recipe(folder, "coop", seeds=[1]), progress=False)
    assert not any(split["wrote"] for split in again["splits"])
    identity = first.identity(1, "base")
    more = prepared(folder, seeds=[2])
    assert set(more.classes.few_shot) == {"1", "2"}
    assert more.identity(1, "base") == identity
    assert more.identity(2, "base") != identity


def test_the_pixels_a_seed_learns_from_do_not_depend_on_the_other_seeds(folder: Path) -> None:
    pixels, train = Pixels(folder / "model"), ClipTrainConfig(epochs=2, global_batch=4)
    found, rows = [], []
    for seeds in ([2], [1, 2]):
        data = prepared(folder, seeds=seeds)
        assert data.train is not None
        shots = data.few_shots(2, "base")
        batches = FewShotBatches(FewShotImages(data.train, shots, pixels, seed=2, augment=True), train, 4, 1, 0, 1)
        found.append([batches[step].pixel_values for step in range(len(batches))])
        rows.append(shots.rows)
    assert rows[0] != rows[1]
    assert len(found[0]) == 6
    for alone, beside in zip(*found, strict=True):
        assert alone is not None and beside is not None and torch.equal(alone, beside)


def test_a_target_of_one_recipe_stays_prepared_for_training_in_another(folder: Path) -> None:
    save_dataset(folder / "data", "others", ("fig", "nut"))
    prepared(folder)
    other = {"name": "others", "layout": "split_zhou", "images": "images", "split": "split_zhou_others.json"}
    toys = fields(folder)["data"]["datasets"]
    crossed = recipe(folder, "coop", data={"datasets": [other], "targets": toys, "protocol": "cross_dataset"})
    prepare_benchmark(crossed, progress=False)
    require_prepared(recipe(folder, "coop"), "tiny")
    require_prepared(crossed, "crossed")


def test_what_is_not_prepared_is_said_with_the_command(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'toys' is not prepared.*python -m pipeline prepare tiny"):
        require_prepared(recipe(folder, "coop"), "tiny")
    prepared(folder)
    with pytest.raises(UserError, match="prepared for the seeds 1, 2, not for 3"):
        require_prepared(recipe(folder, "coop", seeds=[3]), "tiny")
    with pytest.raises(UserError, match=r"was made with data.shots 4, the recipe has 2"):
        require_prepared(recipe(folder, "coop", data={"shots": 2}), "tiny")


def test_a_split_file_that_names_absent_images_is_one_sentence(folder: Path) -> None:
    path = folder / "data" / "toys" / "images" / "test-0-0.png"
    path.unlink()
    with pytest.raises(UserError, match=r"toys: test-0-0.png: the split names them, but they are not in"):
        prepared(folder)
    data = prepared(folder, data={"skip_bad": 1})
    assert len(data.test_images("all").rows) == len(NAMES) * IMAGES["test"] - 1


def test_a_class_whose_test_images_were_all_left_out_is_named(folder: Path) -> None:
    for number in range(IMAGES["test"]):
        (folder / "data" / "toys" / "images" / f"test-4-{number}.png").unlink()
    data = prepared(folder, data={"skip_bad": IMAGES["test"]})
    assert data.test_images("base").names == NAMES[:3]
    with pytest.raises(UserError, match=r"toys has no test image of class 'church' \(1 such classes\)"):
        data.test_images("new")


def test_fewer_images_than_shots_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match="toys: 6 of the classes have fewer than 7 training images"):
        prepared(folder, data={"shots": 7})
    assert len(prepared(folder, data={"shots": 7, "fewer": "all"}).few_shots(1, "all").rows) == 36


def test_shards_of_another_time_are_refused(folder: Path) -> None:
    prepared(folder)
    path = folder / "prepared" / "toys" / CLASSES_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "fingerprints": {"train": "x", "test": "y"}}))
    with pytest.raises(UserError, match=r"is not the data that .*classes.json counts in"):
        PreparedDataset(path.parent)
    path.write_text("{")
    with pytest.raises(UserError, match=r"classes.json is damaged"):
        PreparedDataset(path.parent)


def test_the_drawn_dataset_is_the_same_for_a_seed_and_halves_share_every_colour_and_shape(tmp_path: Path) -> None:
    names = colour_shapes.class_names()
    halves = names[:18], names[18:]
    for part in (0, 1):
        assert len({tuple(sorted({name.split("_")[part] for name in half})) for half in halves}) == 1
    folders = [colour_shapes.draw(tmp_path / str(number), number // 2) for number in range(3)]
    first, second, third = ((folder / "images" / names[0] / "test-000.png").read_bytes() for folder in folders)
    assert first == second
    assert first != third


def test_the_uneven_pool_has_frequent_and_rare_classes_of_the_same_images(tmp_path: Path) -> None:
    folder = colour_shapes.draw(tmp_path, 0)
    even, uneven = (
        json.loads((folder / file).read_text()) for file in (colour_shapes.SPLIT_FILE, colour_shapes.UNEVEN_FILE)
    )
    assert uneven["test"] == even["test"]
    assert {tuple(entry) for entry in uneven["train"]} < {tuple(entry) for entry in even["train"]}
    counts = sorted(Counter(label for _, label, _ in uneven["train"]).values())
    assert (counts[0], counts[-1], len(counts)) == (2, 20, len(colour_shapes.class_names()))
    assert counts[len(counts) // 2] < 10
    (folder / colour_shapes.UNEVEN_FILE).unlink()  # a folder that was drawn before there was an uneven pool
    colour_shapes.draw(tmp_path, 0)
    assert json.loads((folder / colour_shapes.UNEVEN_FILE).read_text()) == uneven
    colour_shapes.draw(tmp_path, 1)
    assert json.loads((folder / colour_shapes.UNEVEN_FILE).read_text()) != uneven
