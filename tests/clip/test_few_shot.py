"""Few-shot subsets and halves: those of the published procedure."""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources.split_zhou import read_split_file
from pipeline.clip.images.classes import LabelledImage, Splits, class_names, group_of_classes
from pipeline.clip.images.few_shot import few_shot
from pipeline.errors import UserError
from tests.clip import base2new

# SHA-256 of the sampled paths, one per line, training before validation. Made by `published` below on the published
# split file with Python's own random module; any other order of calls gives other paths.
CALTECH101 = {
    1: "227259a57d0da32c948a621166ca4b2f7fe193fa5dcf84d084ac07130d5c3679",
    2: "555bd45b9b099f2b2036ea070c7ad9b3463d1a24861e0dcef77ddc1b520a27ac",
    3: "43acea3b0c7fb11877c684267bf6d3eb5fd526ce7c4ebb7fa26b1f24d3e4b328",
}


# The number of training and validation images of each class of that file, in order of first appearance: all that the
# sampling depends on. So these subsets are drawn, and pinned, without the file.
CALTECH101_TRAIN = """
    218 100 399 28 400 21 21 24 27 23 16 64 49 22 42 46 25 22 62 24 30 31 54 24 34 36 35 25 26 28 34
    26 32 34 38 32 26 32 42 34 34 22 17 17 26 50 50 21 27 44 40 16 32 43 57 30 40 39 20 33 22 20 44
    16 38 28 18 20 24 19 22 26 17 28 41 30 24 20 32 20 42 28 18 32 22 43 30 32 18 42 24 43 38 120 18
    30 17 28 20 30
"""
CALTECH101_VAL = """
    87 40 160 11 160 8 8 9 11 9 7 26 20 9 17 18 10 9 25 9 12 12 21 9 14 15 14 10 10 11 13 10 13 14
    15 13 11 13 17 13 13 9 7 7 10 20 20 8 11 18 16 6 13 17 23 12 16 16 8 13 9 8 17 6 15 11 7 8 9 8 9
    11 7 11 16 12 10 8 13 8 17 11 7 13 9 17 12 13 7 17 10 17 15 48 7 12 7 11 8 12
"""
# SHA-256 of the drawn places, one per line as `<class>/<image>`, both counted from 0 in order of first appearance.
CALTECH101_PLACES = {
    1: "390be5bb0c2b50994a6a022481ce99f8127ebeff80181e79c7f24e88e41a6374",
    2: "666b91f958cb9c2b414b32f7cef22e9f00eb26ef014ba3894a7d3afcf2bf4b71",
    3: "ec2e49beb3bc1f1f2ffca883c4e409019696f3d9abc9392bcc9696a601597781",
}


def published(splits: Splits, shots: int, seed: int) -> list[list[Any]]:
    """docs/design.md 5.12, word for word, with the global generator."""
    random.seed(seed)
    result = []
    for images, count in ((splits.train, shots), (splits.val, min(shots, 4))):
        tracker = defaultdict(list)
        for image in images:
            tracker[image.label].append(image)
        subset = []
        for items in tracker.values():
            subset.extend(random.sample(items, count) if len(items) >= count else items)
        result.append(subset)
    return result


def numbered(per_class: list[int], classes: list[int]) -> tuple[LabelledImage, ...]:
    """Images of classes in the given order, so many of each."""
    return tuple(
        LabelledImage(f"{label}/{number}.jpg", label, f"class {label}")
        for label, count in zip(classes, per_class, strict=True)
        for number in range(count)
    )


@pytest.fixture
def splits() -> Splits:
    classes = [3, 0, 4, 1, 2]  # first appearance is not the order of labels, as in the published Flowers split
    return Splits(numbered([9, 20, 8, 30, 8], classes), numbered([4, 2, 9, 4, 3], classes), numbered([2] * 5, classes))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 4, 8])
def test_subsets_are_those_of_the_published_procedure(splits: Splits, shots: int, seed: int) -> None:
    found = few_shot(splits, shots, seed)
    assert [list(found.train), list(found.val)] == published(splits, shots, seed)
    assert found.test == splits.test


def test_sampling_is_pinned_whatever_the_version_of_python(splits: Splits) -> None:
    found = few_shot(splits, 2, seed=1)
    assert [image.path for image in found.train] == [
        "3/2.jpg",
        "3/1.jpg",
        "0/8.jpg",
        "0/3.jpg",
        "4/7.jpg",
        "4/6.jpg",
        "1/14.jpg",
        "1/15.jpg",
        "2/6.jpg",
        "2/7.jpg",
    ]
    assert [image.path for image in found.val] == [
        "3/1.jpg",
        "3/0.jpg",
        "0/1.jpg",
        "0/0.jpg",
        "4/6.jpg",
        "4/8.jpg",
        "1/0.jpg",
        "1/2.jpg",
        "2/1.jpg",
        "2/2.jpg",
    ]


@pytest.mark.parametrize("seed", CALTECH101)
def test_caltech101_gives_the_published_subsets(pytestconfig: pytest.Config, seed: int) -> None:
    splits = read_split_file(base2new.folder(pytestconfig) / "splits" / "split_zhou_Caltech101.json")
    found = few_shot(splits, 16, seed)
    assert [list(found.train), list(found.val)] == published(splits, 16, seed)
    assert (len(found.train), len(found.val)) == (1600, 400)
    paths = "\n".join(image.path for image in (*found.train, *found.val))
    assert hashlib.sha256(paths.encode()).hexdigest() == CALTECH101[seed]


def places(found: Splits, whole: Splits) -> str:
    """The digest of the places in the whole splits of what was drawn from them."""
    lines = []
    for images, everything in ((found.train, whole.train), (found.val, whole.val)):
        order: dict[int, int] = {}
        seen: dict[int, int] = defaultdict(int)
        place = {}
        for image in everything:
            place[image.path] = f"{order.setdefault(image.label, len(order))}/{seen[image.label]}"
            seen[image.label] += 1
        lines += [place[image.path] for image in images]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("seed", CALTECH101_PLACES)
def test_caltech101_gives_the_published_places_by_its_class_sizes_alone(seed: int) -> None:
    train, val = (list(map(int, sizes.split())) for sizes in (CALTECH101_TRAIN, CALTECH101_VAL))
    assert (len(train), sum(train), len(val), sum(val)) == (100, 4128, 100, 1649)
    splits = Splits(numbered(train, list(range(100))), numbered(val, list(range(100))), ())
    found = few_shot(splits, 16, seed)
    assert [list(found.train), list(found.val)] == published(splits, 16, seed)
    assert (len(found.train), len(found.val)) == (1600, 400)
    assert places(found, splits) == CALTECH101_PLACES[seed]


@pytest.mark.parametrize("seed", CALTECH101_PLACES)
def test_the_places_are_those_in_the_published_split_file(pytestconfig: pytest.Config, seed: int) -> None:
    splits = read_split_file(base2new.folder(pytestconfig) / "splits" / "split_zhou_Caltech101.json")
    for images, sizes in ((splits.train, CALTECH101_TRAIN), (splits.val, CALTECH101_VAL)):
        counts: dict[int, int] = defaultdict(int)
        for image in images:
            counts[image.label] += 1
        assert list(counts.values()) == list(map(int, sizes.split()))
    train, val = published(splits, 16, seed)
    assert places(Splits(tuple(train), tuple(val), ()), splits) == CALTECH101_PLACES[seed]


def test_a_class_with_fewer_images_than_shots_is_named(splits: Splits) -> None:
    with pytest.raises(UserError, match="3 of the classes have fewer than 16 training images, 'class 4' only 8"):
        few_shot(splits, 16, seed=1)


def test_a_class_with_fewer_images_than_shots_may_give_all_it_has(splits: Splits) -> None:
    found = few_shot(splits, 16, seed=1, fewer="all")
    assert [list(found.train), list(found.val)] == published(splits, 16, seed=1)
    assert sum(image.label == 4 for image in found.train) == 8


def test_no_shots_are_refused(splits: Splits) -> None:
    with pytest.raises(UserError, match="number of shots is 0"):
        few_shot(splits, 0, seed=1)


def test_halves_are_of_the_labels_in_training_and_count_from_0(splits: Splits) -> None:
    base, new = group_of_classes(splits, "base"), group_of_classes(splits, "new")
    assert class_names(base.train) == base.names() == ["class 0", "class 1", "class 2"]
    assert new.names() == ["class 3", "class 4"]
    assert {image.label for image in new.test} == {0, 1}
    assert len(base.test) + len(new.test) == len(splits.test)
    assert group_of_classes(splits, "all") is splits


def test_base_shots_are_those_of_all_classes(splits: Splits) -> None:
    everything = few_shot(splits, 4, seed=2)
    base = group_of_classes(everything, "base")
    assert {image.path for image in base.train} == {image.path for image in everything.train if image.label < 3}


@pytest.mark.parametrize("count", [5, 6])
def test_the_larger_half_is_the_base(count: int) -> None:
    images = numbered([1] * count, list(range(count)))
    base = group_of_classes(Splits(images, (), images), "base")
    assert len(base.names()) == math.ceil(count / 2)


def test_one_class_has_no_halves() -> None:
    images = numbered([3], [0])
    with pytest.raises(UserError, match="at least two"):
        group_of_classes(Splits(images, (), images), "base")


def test_a_label_with_two_names_is_refused_and_a_name_with_two_labels_is_not() -> None:
    assert class_names([LabelledImage("a", 0, "sunglasses"), LabelledImage("b", 1, "sunglasses")]) == ["sunglasses"] * 2
    with pytest.raises(UserError, match="b is of class 0 'dog', but a of class 0 'cat'"):
        class_names([LabelledImage("a", 0, "cat"), LabelledImage("b", 0, "dog")])


def test_every_subset_of_easy_shapes_and_caltech_can_be_drawn(pytestconfig: pytest.Config) -> None:
    root: Path = base2new.folder(pytestconfig)
    for file, classes in (
        ("caltech-101/split_zhou_Caltech101.json", 100),
        ("easy_shapes/split_zhou_EasyShapes.json", 24),
    ):
        splits = read_split_file(root / file)
        found = group_of_classes(few_shot(splits, 16, seed=1), "base")
        assert (len(found.names()), len(found.train)) == (classes // 2, 16 * classes // 2)
