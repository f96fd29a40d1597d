"""Reads the datasets of the base-to-new benchmark in their published layouts, and finds missing or altered files.

A split file `split_zhou_<Name>.json` holds `train`, `val` and `test`, each a list of `[path, label, class name]`.
Source: docs/design.md 5.11.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.sources.class_folders import labelled_folders, read_class_folders, read_csv
from data_prep.sources.image_files import why_missing
from data_prep.sources.text_files import lines_of, read_json
from data_prep.sources.unlabelled import read_unlabelled
from pipeline.clip.images.classes import LabelledImage, Splits, refuse_one_text, refuse_twice
from pipeline.clip.images.datasets import Dataset
from pipeline.errors import UserError
from pipeline.files.atomic import sha256

NAMED = 3  # missing images that an error message names; it counts the others


def read_split_file(path: Path) -> Splits:
    """The splits of a split file.

    Raises UserError when it is missing or has another content, when a class has two names, when an image is twice in a
    split, and for a class that training or test lacks.
    """
    if not path.is_file():
        raise UserError(f"There is no split file {path}. Download it, or correct the folder.")
    content = read_json(path, "an object with train and test", "Download the split file again.")
    if not isinstance(content, dict) or not {"train", "test"} <= set(content):
        raise UserError(f"{path} holds no object with train and test. Download the split file again.")
    splits = Splits(*(tuple(_images(content.get(split, []), path, split)) for split in ("train", "val", "test")))
    if not splits.test:
        raise UserError(f"{path} has no test images. Download the split file again.")
    splits.names()
    refuse_twice(splits, str(path))
    everything = (*splits.train, *splits.val, *splits.test)
    for kind, part in (("training", splits.train), ("test", splits.test)):
        present = {image.label for image in part}
        empty = [image for image in everything if image.label not in present]
        if present and empty:
            raise UserError(
                f"{path} has no {kind} image of class '{empty[0].name}' ({len({i.label for i in empty})} such "
                "classes). Remove the class from all splits, or add images."
            )
    return splits


def _images(items: Any, path: Path, split: str) -> Iterable[LabelledImage]:
    for number, item in enumerate(items if isinstance(items, list) else [items]):
        match item:
            case [str(image), int(label), str(name)] if label >= 0 and name.strip():
                yield LabelledImage(image, label, name)
            case _:
                raise UserError(
                    f"{path}, {split} entry {number} is {json.dumps(item)[:80]}; expected [path, label, class name] "
                    "with a label of 0 or more. Download the split file again."
                )


def read_aircraft(folder: Path) -> Splits:
    """The splits in FGVC Aircraft's own lists, `variants.txt` and `images_variant_{train,val,test}.txt`.

    Lines of the latter are `<id> <variant>`.
    """
    variants = _lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(variants)}

    def images(split: str) -> Iterable[LabelledImage]:
        file = folder / f"images_variant_{split}.txt"
        for number, line in enumerate(_lines(file), start=1):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise UserError(
                    f"{file}, line {number} names '{name}', which is not in variants.txt. Restore the file."
                )
            yield LabelledImage(f"{image}.jpg", labels[name], name)

    splits = Splits(tuple(images("train")), tuple(images("val")), tuple(images("test")))
    refuse_twice(splits, str(folder))
    return splits


def read_class_names(path: Path) -> dict[str, str]:
    """Class names by folder from `classnames.txt`, in its order; it has a line `<folder> <class name>` per class."""
    return {folder: name for folder, _, name in (line.partition(" ") for line in _lines(path))}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"There is no file {path}. It comes with the dataset; put it there.")
    return [line for _, line in lines_of(path)]


def read_dataset(description: Dataset, root: Path) -> Splits:
    """The splits of a known dataset under `root`, by the layout of its description.

    ImageNet's validation images are the test split. Its files are read in sorted order, so that few-shot subsets do not
    depend on the file system as the published ones do (docs/design.md 5.12). ImageNet's four variants have only a test
    split.
    """
    splits = _read_layout(description, root / description.folder)
    if not description.classes:  # the user's own dataset; published ImageNet has two classes named "sunglasses"
        refuse_one_text(splits.names(), description.name)
    return splits


def _read_layout(description: Dataset, folder: Path) -> Splits:
    if description.layout == "csv":
        assert description.split is not None
        return read_csv(folder / description.split)
    if description.layout == "unlabelled":
        return read_unlabelled(description, folder)
    if description.layout == "class_folders" and not description.classes:
        return read_class_folders(folder / description.images)
    if description.layout == "split_zhou":
        assert description.split is not None
        return read_split_file(folder / description.split)
    if description.layout == "aircraft":
        return read_aircraft(folder)
    names = read_class_names(folder / "classnames.txt")
    if description.layout == "imagenet":
        return read_class_folders(folder / description.images, names, test="val", val=None)
    if description.name == "imagenetv2":  # its folders are named by the labels 0 to 999
        names = {str(label): name for label, name in enumerate(names.values())}
    return Splits((), (), tuple(labelled_folders(folder / description.images, "", names, present_only=True)))


def findings(description: Dataset, root: Path) -> list[str]:
    """Messages about missing and altered files; empty when the dataset is complete and as published.

    The message about missing files ends with what to download and where it belongs.
    """
    return [*altered(description, root), *missing(description, root)]


def missing(description: Dataset, root: Path) -> list[str]:
    """Messages about files without which a dataset cannot be used, with what to download and where it belongs."""
    folder = root / description.folder
    where = f" {description.instructions(str(root))}" if description.download else ""
    if not folder.is_dir():
        advice = where or " Put the images there, or correct data.root."
        return [f"{description.name}: the folder {folder} is missing.{advice}"]
    try:
        splits = read_dataset(description, root)
    except UserError as error:
        return [f"{description.name}: {error}{where}"]
    images = folder / description.images
    lacking = missing_images(splits, images) if description.layout in ("split_zhou", "aircraft", "csv") else []
    return [f"{missing_sentence(lacking, images)}{where}"] if lacking else []


def altered(description: Dataset, root: Path) -> list[str]:
    """Messages about differences from the published dataset, with which scores are not comparable."""
    if not description.classes:
        return []  # the user's own dataset
    try:
        splits = read_dataset(description, root)
    except UserError:
        return []
    found = []
    split = root / description.folder / description.split if description.split else None
    if split and description.sha256 and sha256(split) != description.sha256:
        found.append(f"{description.name}: {split} is not the published file (its sha256 differs).")
    counts = tuple(len(part) for part in (splits.train, splits.val, splits.test))
    published = (description.train, description.val, description.test)
    if counts != published:
        found.append(
            f"{description.name}: {_three(counts)} images for training, validation and test; published are "
            f"{_three(published)}."
        )
    classes = len(splits.names())
    if classes != description.classes:
        found.append(f"{description.name}: {classes} classes; published are {description.classes}.")
    return found


def missing_images(splits: Splits, images: Path) -> list[str]:
    """Paths in the splits that do not exist under `images`, sorted."""
    named = {image.path for part in (splits.train, splits.val, splits.test) for image in part}
    return sorted(path for path in named if not os.path.isfile(images / path))


def missing_sentence(missing: list[str], images: Path) -> str:
    """An error message that names the first missing images and counts the others."""
    rest = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    why = why_missing([images], missing[0])
    because = f" The first one {why}" if why else ""
    return f"{', '.join(missing[:NAMED])}{rest}: the split names them, but they are not in {images}.{because}"


def _three(counts: tuple[int, ...]) -> str:
    return " / ".join(map(str, counts))
