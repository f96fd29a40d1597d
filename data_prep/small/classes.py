"""The names of ImageNet's 1,000 classes, from the tables in the package timm, which is not imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from pipeline.errors import UserError

_TABLES = "timm/data/_info/"


def imagenet_names() -> list[str]:
    """The first name of each class, in the order of a classifier's outputs; UserError where timm is not installed."""
    try:
        package = distribution("timm")
    except PackageNotFoundError:
        raise UserError(
            "The names of ImageNet's classes are read from the package timm, which is not installed; run "
            "`pip install --no-deps timm==1.0.31`."
        ) from None
    order, words = (
        str(package.locate_file(_TABLES + name)) for name in ("imagenet_synsets.txt", "imagenet_synset_to_lemma.txt")
    )
    with open(words, encoding="utf-8") as file:
        lemmas = dict(line.rstrip("\n").split("\t", 1) for line in file if line.strip())
    with open(order, encoding="utf-8") as file:
        return [lemmas[line.strip()].split(",")[0].strip() for line in file if line.strip()]
