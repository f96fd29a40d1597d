"""Reading published splits, class folders and CSV files, and saying what is missing or altered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.bad_records import BadRecord
from data_prep.sources.class_folders import ImageSplit, read_class_folders, read_csv
from data_prep.sources.split_zhou import findings, missing_images, read_dataset, read_split_file
from pipeline.clip.images.classes import LabelledImage
from pipeline.clip.images.datasets import DATASETS, Dataset
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from tests.clip import base2new
from tests.tiny_clip import picture


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or picture(1))
    return path


def split_file(path: Path, **parts: Any) -> Path:
    splits = {
        "train": [["a/1.png", 0, "ant"], ["b/1.png", 1, "bee"]],
        "val": [],
        "test": [["a/2.png", 0, "ant"], ["b/2.png", 1, "bee"]],
    }
    return write(path, json.dumps({**splits, **parts}).encode())


TOY = Dataset("toy", 2, "toy", "images", 2, 0, 2, "the toys", split="split.json")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    split_file(tmp_path / "toy" / "split.json")
    for name in ("a/1.png", "b/1.png", "a/2.png", "b/2.png"):
        write(tmp_path / "toy" / "images" / name)
    return tmp_path


def test_a_split_file_is_read_as_published(toy: Path) -> None:
    splits = read_dataset(TOY, toy)
    assert splits.train == (LabelledImage("a/1.png", 0, "ant"), LabelledImage("b/1.png", 1, "bee"))
    assert splits.names() == ["ant", "bee"]


def test_a_dataset_that_is_there_has_no_findings(toy: Path) -> None:
    assert findings(TOY, toy) == []


def test_what_is_missing_is_said_with_where_it_comes_from_and_goes(toy: Path) -> None:
    (toy / "toy" / "images" / "b" / "1.png").unlink()
    assert [f.split(":")[0] for f in findings(TOY, toy)] == ["b/1.png"]
    (toy / "toy" / "split.json").unlink()
    (sentence,) = findings(TOY, toy)
    assert "There is no split file" in sentence and "Download the toys" in sentence
    (sentence,) = findings(TOY, toy / "elsewhere")
    assert "is missing. Download the toys" in sentence


def test_what_is_altered_is_said(toy: Path) -> None:
    other = replace(TOY, sha256="0" * 64, train=3, classes=5)
    found = findings(other, toy)
    assert any("not the published file" in sentence for sentence in found)
    assert any("2 / 0 / 2 images for training, validation and test; published are 3 / 0 / 2" in f for f in found)
    assert any("2 classes; published are 5" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"train": [["a.png", "0", "ant"]]}, r"train entry 0 is .*expected \[path, label, class name\]"),
        ({"train": [["a.png", -1, "ant"]]}, "train entry 0"),
        ({"train": [["a.png", 0, " "]]}, "train entry 0"),
        ({"test": []}, "has no test images"),
        ({"test": [["c.png", 2, "cat"]]}, "no training image of class 'cat'"),
        ({"test": [["a/2.png", 0, "ant"]]}, r"no test image of class 'bee' \(1 such classes\). Remove the class"),
        ({"train": [["a.png", 0, "ant"]] * 2}, "names a.png twice in train, of class 'ant' and of class 'ant'"),
        (
            {"test": [["a/2.png", 0, "ant"], ["a/2.png", 1, "bee"]]},
            "names a/2.png twice in test, of class 'ant' and of class 'bee'; expected every image once",
        ),
        ({"test": [["c.png", 0, "cat"]]}, "c.png is of class 0 'cat', but a/1.png of class 0 'ant'"),
    ],
)
def test_a_damaged_split_file_is_refused(tmp_path: Path, parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_split_file(split_file(tmp_path / "split.json", **parts))


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_a_file_that_is_no_split_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="Download the split file again"):
        read_split_file(write(tmp_path / "split.json", content))


def test_aircraft_is_read_from_its_own_lists(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    write(folder / "variants.txt", b"707-320\nBAE 146-200\n")
    for split in ("train", "val", "test"):
        write(folder / f"images_variant_{split}.txt", b"0000001 BAE 146-200\n")
    splits = read_dataset(DATASETS["fgvc_aircraft"], tmp_path)
    assert splits.test == (LabelledImage("0000001.jpg", 1, "BAE 146-200"),)
    write(folder / "images_variant_test.txt", b"0000001 Concorde\n")
    write(folder / "images_variant_test.txt", b"0000001 BAE 146-200\n" * 2)
    with pytest.raises(UserError, match=r"names 0000001.jpg twice in test"):
        read_dataset(DATASETS["fgvc_aircraft"], tmp_path)
    write(folder / "images_variant_test.txt", b"0000001 Concorde\n")
    with pytest.raises(UserError, match=r"line 1 names 'Concorde', which is not in variants.txt"):
        read_dataset(DATASETS["fgvc_aircraft"], tmp_path)


def test_imagenet_is_read_in_sorted_order_with_two_classes_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "imagenet" / "classnames.txt", b"n01 sunglasses\nn02 sunglasses\n")
    for split in ("train", "val"):
        for name in ("n02/b.JPEG", "n02/a.JPEG", "n01/c.JPEG"):
            write(tmp_path / "imagenet" / "images" / split / name)
    splits = read_dataset(DATASETS["imagenet"], tmp_path)
    assert [(image.path, image.label) for image in splits.test] == [
        ("val/n01/c.JPEG", 0),
        ("val/n02/a.JPEG", 1),
        ("val/n02/b.JPEG", 1),
    ]
    assert splits.names() == ["sunglasses", "sunglasses"]
    assert splits.val == ()


def test_variants_of_imagenet_have_a_test_split_alone(tmp_path: Path) -> None:
    for images in ("imagenet-adversarial/imagenet-a/n02", "imagenetv2/imagenetv2-matched-frequency-format-val/1"):
        write(tmp_path / images.partition("/")[0] / "classnames.txt", b"n01 cat\nn02 dog\n")
        write(tmp_path / images / "x.jpg")
    for name in ("imagenet_a", "imagenetv2"):
        splits = read_dataset(DATASETS[name], tmp_path)
        assert splits.train == splits.val == ()
        assert [(image.label, image.name) for image in splits.test] == [(0, "dog")]


def test_class_folders_need_no_code(tmp_path: Path) -> None:
    for name in ("train/wasp/1.png", "train/ant/1.png", "test/wasp/2.PNG", "test/ant/notes.txt", "test/ant/3.jpg"):
        write(tmp_path / name)
    splits = read_class_folders(tmp_path)
    assert splits.train == (LabelledImage("train/ant/1.png", 0, "ant"), LabelledImage("train/wasp/1.png", 1, "wasp"))
    assert [image.path for image in splits.test] == ["test/ant/3.jpg", "test/wasp/2.PNG"]


def test_classes_that_validation_lacks_keep_their_numbers_elsewhere(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/1.png", "test/ant/2.png", "test/bee/2.png", "val/bee/3.png"):
        write(tmp_path / name)
    splits = read_class_folders(tmp_path)
    assert splits.val == (LabelledImage("val/bee/3.png", 1, "bee"),)
    assert splits.names() == ["ant", "bee"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/ant/1.png"], "holds no class folders with images"),
        (["train/ant/1.png", "train/bee/1.png", "test/ant/1.png"], "test has no images of class 'bee'"),
        (["train/ant/1.png", "test/ant/readme.txt"], "holds no images"),
    ],
)
def test_folders_that_lack_something_are_refused(tmp_path: Path, files: list[str], sentence: str) -> None:
    for name in files:
        write(tmp_path / name)
    with pytest.raises(UserError, match=sentence):
        read_class_folders(tmp_path)


def test_a_csv_file_needs_no_code(tmp_path: Path) -> None:
    table = b"path,class,split\nx.png,wasp,train\ny.png,ant,train\nz.png,ant,test\nw.png,wasp,test\n"
    splits = read_csv(write(tmp_path / "images.csv", table))
    assert splits.train == (LabelledImage("x.png", 1, "wasp"), LabelledImage("y.png", 0, "ant"))


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (b"path,split\na,train\n", "names path, class and split. Add 'class'"),
        (b"path,class,split\na.png,,train\n", "line 2 has no class"),
        (b"path,class,split\na.png,ant,training\n", "split 'training'.*Did you mean 'train'"),
        (b"path,class,split\na.png,ant,train\nb.png,bee,test\nc.png,ant,test\n", "no images of class 'bee'"),
        (
            b"path,class,split\na.png,ant,train\na.png,bee,train\nb.png,bee,test\nc.png,ant,test\n",
            "images.csv names a.png twice in train, of class 'ant' and of class 'bee'",
        ),
    ],
)
def test_a_damaged_csv_file_is_refused(tmp_path: Path, table: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_csv(write(tmp_path / "images.csv", table))


def test_images_become_samples_and_bad_ones_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "b.png", b"no image")
    source = ImageSplit(tuple(LabelledImage(f"{name}.png", 1, "ant") for name in "abc"), tmp_path)
    first, second, third = source.records()
    assert isinstance(first, Sample) and (first.id, first.answer, first.meta) == ("a.png", "ant", {"label": 1})
    assert isinstance(second, BadRecord) and "cannot be decoded" in second.reason
    assert isinstance(third, BadRecord) and "does not exist" in third.reason
    before = source.fingerprint()
    write(tmp_path / "c.png")
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    "name", ["caltech101", "dtd", "eurosat", "oxford_flowers", "oxford_pets", "stanford_cars", "ucf101"]
)
def test_descriptions_are_those_of_the_published_split_files(
    pytestconfig: pytest.Config, name: str, tmp_path: Path
) -> None:
    description = DATASETS[name]
    published = base2new.folder(pytestconfig) / "splits" / str(description.split)
    write(tmp_path / description.folder / str(description.split), published.read_bytes())
    (sentence,) = findings(description, tmp_path)  # nothing altered, but no image is there
    assert "the split names them, but they are not in" in sentence


def test_the_part_of_caltech101_that_is_there_is_whole(pytestconfig: pytest.Config) -> None:
    root = base2new.folder(pytestconfig)
    splits = read_dataset(DATASETS["caltech101"], root)
    assert missing_images(splits, root / "caltech-101" / "101_ObjectCategories") == []
    assert any("not the published file" in sentence for sentence in findings(DATASETS["caltech101"], root))
    samples = list(ImageSplit(splits.test[:3], root / "caltech-101" / "101_ObjectCategories").records())
    assert all(isinstance(sample, Sample) and sample.answer == "face" for sample in samples)
