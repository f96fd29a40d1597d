"""The published datasets of the benchmark: sizes, text templates, folders and download locations.

Class names are read from a dataset's split file, `classnames.txt` or `variants.txt`. Counts, file names and templates
are those published with CoOp (docs/design.md 5.11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.clip.images.classes import base_classes
from pipeline.clip.methods.base import TEMPLATE
from pipeline.errors import UserError, nearest

Layout = Literal["split_zhou", "aircraft", "imagenet", "class_folders", "csv", "unlabelled"]
MIRROR = "https://huggingface.co/datasets/zhengli97/prompt_learning_dataset"  # all but ImageNet, with split files
SPLITS = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


@dataclass(frozen=True)
class Dataset:
    """One dataset in the CoOp layout: `<root>/<folder>/` with `split` in it and images under `images`.

    `template` with one `{}` is the zero-shot text; `train`, `val`, `test` are the published numbers of images (0: not
    published); `sha256` is that of the published split file, None where it is not known.

    Images without labels have their class names in `class_list` (None: in `classes.txt`), and test images in
    `test_folder` (None: there are none).
    """

    name: str
    classes: int
    folder: str
    images: str
    train: int
    val: int
    test: int
    download: str
    template: str = TEMPLATE
    split: str | None = None
    layout: Layout = "split_zhou"
    sha256: str | None = None
    class_list: tuple[str, ...] | None = None
    test_folder: str | None = None

    @property
    def base(self) -> int:
        """The number of base classes."""
        return base_classes(self.classes)

    @property
    def new(self) -> int:
        """The number of new classes."""
        return self.classes - self.base

    def instructions(self, root: str) -> str:
        """One sentence: the download address, and where the files go under `root`."""
        where = f"{root}/{self.folder}"
        files = f"images go to {where}/{self.images}" if self.images != "." else f"images go to {where}"
        if self.layout == "split_zhou":
            return (
                f"Download {self.download}; its {files} and {self.split} (from {SPLITS}) to {where}. Or all: {MIRROR}"
            )
        if self.layout == "aircraft":
            return f"Download {self.download} and make its folder data/ {where}, with variants.txt and images/ in it."
        return f"Download {self.download}; its {files} and classnames.txt (from {SPLITS}) to {where}."


def _zhou(
    name: str,
    title: str,
    classes: int,
    place: str,
    counts: tuple[int, int, int],
    template: str,
    download: str,
    sha256: str | None = None,
) -> Dataset:
    folder, _, images = place.partition("/")
    split = f"split_zhou_{title}.json"
    return Dataset(name, classes, folder, images or ".", *counts, download, template, split, "split_zhou", sha256)


def _shifted(name: str, classes: int, place: str, test: int, download: str) -> Dataset:
    folder, _, images = place.partition("/")
    return Dataset(name, classes, folder, images, 0, 0, test, download, layout="class_folders")


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_ALL = (
    Dataset("imagenet", 1000, "imagenet", "images", 1_281_167, 0, 50_000, "https://image-net.org", layout="imagenet"),
    _zhou(
        "caltech101",
        "Caltech101",
        100,
        "caltech-101/101_ObjectCategories",
        (4128, 1649, 2465),
        TEMPLATE,
        "https://data.caltech.edu/records/mzrjq-6wc02",
        "52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
    ),
    _zhou(
        "oxford_pets",
        "OxfordPets",
        37,
        "oxford_pets/images",
        (2944, 736, 3669),
        "a photo of a {}, a type of pet.",
        f"{_OXFORD}/pets",
        "d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
    ),
    _zhou(
        "stanford_cars",
        "StanfordCars",
        196,
        "stanford_cars",
        (6509, 1635, 8041),
        TEMPLATE,
        MIRROR,
        "40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
    ),
    _zhou(
        "oxford_flowers",
        "OxfordFlowers",
        102,
        "oxford_flowers/jpg",
        (4093, 1633, 2463),
        "a photo of a {}, a type of flower.",
        f"{_OXFORD}/flowers/102",
        "2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
    ),
    _zhou(
        "food101",
        "Food101",
        101,
        "food-101/images",
        (50_500, 20_200, 30_300),
        "a photo of {}, a type of food.",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    ),
    Dataset(
        "fgvc_aircraft",
        100,
        "fgvc_aircraft",
        "images",
        3334,
        3333,
        3333,
        f"{_OXFORD}/fgvc-aircraft",
        "a photo of a {}, a type of aircraft.",
        layout="aircraft",
    ),
    _zhou("sun397", "SUN397", 397, "sun397/SUN397", (15_880, 3970, 19_850), TEMPLATE, MIRROR),
    _zhou(
        "dtd",
        "DescribableTextures",
        47,
        "dtd/images",
        (2820, 1128, 1692),
        "{} texture.",
        f"{_OXFORD}/dtd",
        "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
    ),
    _zhou(
        "eurosat",
        "EuroSAT",
        10,
        "eurosat/2750",
        (13_500, 5400, 8100),
        "a centered satellite photo of {}.",
        "https://github.com/phelber/EuroSAT",
        "541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
    ),
    _zhou(
        "ucf101",
        "UCF101",
        101,
        "ucf101/UCF-101-midframes",
        (7639, 1898, 3783),
        "a photo of a person doing {}.",
        MIRROR,
        "d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
    ),
    _shifted(
        "imagenetv2",
        1000,
        "imagenetv2/imagenetv2-matched-frequency-format-val",
        10_000,
        "https://github.com/modestyachts/ImageNetV2 (matched frequency)",
    ),
    _shifted(
        "imagenet_sketch", 1000, "imagenet-sketch/images", 50_889, "https://github.com/HaohanWang/ImageNet-Sketch"
    ),
    _shifted(
        "imagenet_a",
        200,
        "imagenet-adversarial/imagenet-a",
        7500,
        "https://github.com/hendrycks/natural-adv-examples",
    ),
    _shifted("imagenet_r", 200, "imagenet-rendition/imagenet-r", 30_000, "https://github.com/hendrycks/imagenet-r"),
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
BASE_TO_NEW = tuple(name for name, dataset in DATASETS.items() if dataset.layout != "class_folders")
CROSS_DATASET_TARGETS = tuple(name for name in BASE_TO_NEW if name != "imagenet")
DOMAIN_TARGETS = tuple(name for name, dataset in DATASETS.items() if dataset.layout == "class_folders")


def dataset(name: str) -> Dataset:
    """The description of a dataset; UserError for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"There is no dataset '{name}'; known are {', '.join(DATASETS)}.{nearest(name, DATASETS)}")
    return DATASETS[name]
