"""The user's own images without labels: a folder with everything in it, and the names of the classes.

Images are taken from all folders below it, by the end of their names; other files and hidden ones are passed over.
`classes.txt` beside them has a class name per line, unless the recipe has the names. Labelled test images may be in a
folder of their own, `<test>/<class name>/<image>`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.class_folders import is_image, labelled_folders, need_every_class
from data_prep.sources.text_files import lines_of
from pipeline.clip.images.classes import UNLABELLED, LabelledImage, Splits
from pipeline.clip.images.datasets import Dataset
from pipeline.clip.recipe_data import refuse_class_list
from pipeline.errors import UserError

CLASSES_FILE = "classes.txt"


def read_unlabelled(description: Dataset, folder: Path) -> Splits:
    """The images of an unlabelled dataset in its folder, and its class names.

    UserError without images, without two class names, for a file name that is no text, and for a test folder that lacks
    a class or has another one.
    """
    names = description.class_list or _class_list(folder / CLASSES_FILE, description.name)
    images = folder / description.images
    apart = description.test_folder
    if apart is not None and not (images / apart).is_dir():
        raise UserError(
            f"{description.name}: there is no folder {images / apart} of test images. Correct its name in test."
        )
    pool = tuple(LabelledImage(path, UNLABELLED, "") for path in _image_paths(images, apart))
    if not pool:
        raise UserError(
            f"{images} holds no images. Put the images there that are to be labelled, or correct data.root."
        )
    test: tuple[LabelledImage, ...] = ()
    if apart is not None:
        test = tuple(labelled_folders(images, apart, {name: name for name in names}))
        need_every_class(test, {name: name for name in names}, str(images / apart))
    return Splits(pool, (), test, classes=names)


def _class_list(path: Path, dataset: str) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(
            f"{dataset} has images without labels, and no class names: there is no {path}. Write it with a class name "
            "per line, or give the dataset's classes in the recipe."
        )
    names = tuple(line for _, line in lines_of(path))
    if len(names) < 2:
        raise UserError(f"{path} holds {len(names)} class names, expected two or more, one per line.")
    try:
        refuse_class_list(names, str(path))
    except ValueError as error:
        raise UserError(f"{error}. Correct the file.") from None
    return names


def _image_paths(images: Path, apart: str | None) -> Iterator[str]:
    """The paths of the images below a folder, relative to it and sorted, without those in its folder `apart`."""
    left_out = None if apart is None else os.path.normpath(images / apart)
    found = []
    for folder, inside, files in os.walk(images):
        inside[:] = [
            name
            for name in inside
            if not name.startswith(".") and os.path.normpath(os.path.join(folder, name)) != left_out
        ]
        found += [os.path.relpath(os.path.join(folder, name), images) for name in files if is_image(name)]
    for path in sorted(found):
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{images} holds an image whose name is no text ({path!a}). Rename it.") from None
        yield Path(path).as_posix()
