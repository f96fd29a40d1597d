"""The section of a benchmark recipe on active prompt learning, and what a row says about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.clip.recipe_descriptions import DescriptionsConfig
from pipeline.config.base import Section
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.clip.recipe_data import ClipDataConfig  # needs torch, which reports of finished runs do without

Acquisition = Literal["random", "entropy", "coreset", "badge", "class_guided", "all"]
Balance = Literal["none", "pcb", "pcb_released"]
BALANCED = ("entropy", "coreset", "badge")  # acquisitions that leave candidates to choose from


class ActiveConfig(Section):
    """How a unit asks for labels, round by round (docs/design.md 5.15)."""

    rounds: int = Field(8, ge=1, description="rounds of asking for labels and training; the first draws its images")
    labels_per_round: int | None = Field(
        None, ge=1, description="labels asked for in each round; null: as many as there are classes"
    )
    candidates: float = Field(
        0.1, gt=0, le=1, description="share of the pool that an acquisition leaves to the balancing"
    )
    first: Literal["random", "class_guided"] = Field(
        "random",
        description="how the first round draws its images: at random, or class_guided by the zero-shot model, which "
        "rows that acquire so do in any case",
    )

    oracle: Literal["labels", "file"] = Field(
        "labels",
        description="who says the labels: labels, those of the training split, as benchmarks do; file, a person: each "
        "round writes ask.csv into the run's folder, stops with exit code 75, and goes on once it is filled in",
    )

    def labels(self, classes: int) -> int:
        """Labels per round of a dataset with so many classes."""
        return self.labels_per_round or classes


class AskingConfig(Section):
    """What a row of a benchmark with the protocol `active` says about the images that it asks for."""

    acquire: Acquisition | None = Field(
        None,
        description="protocol active: which images to have labelled; all: every image of the pool at once, the upper "
        "bound",
    )
    balance: Balance | None = Field(
        None,
        description="protocol active: pcb takes candidates guessed as the classes with the fewest labels; pcb_released "
        "picks at random once such a class has no candidate, as released; null or none: the best by the acquisition",
    )
    free_labels: bool = Field(
        False,
        description="class_guided: take the model's guess as the label of an image that it is sure enough of, which "
        "costs nothing",
    )
    descriptions: DescriptionsConfig | None = Field(
        None, description="protocol active: texts that describe the classes, from a file; null: their names alone"
    )
    badge: Literal["released"] | None = Field(
        None, description="released: gradients of a smaller last batch overwrite others, as in the released code"
    )

    @property
    def asks(self) -> bool:
        """Whether the row asks for labels in rounds."""
        return self.acquire not in (None, "all")

    @property
    def balances(self) -> bool:
        """Whether picks are balanced over the classes."""
        return self.balance in ("pcb", "pcb_released")

    def refuse_contradictions(self, name: str, learns: bool, per_image: bool, active: bool) -> None:
        """Raise ValueError, with what to do, for fields that contradict each other or the protocol.

        Args:
            name: the row's name.
            learns: whether its method has trainables.
            per_image: whether its text features depend on the image.
            active: whether the protocol is `active`.
        """
        said = [field for field in AskingConfig.model_fields if getattr(self, field)]
        if not active:
            if said:
                raise ValueError(
                    f"{name} has {', '.join(said)}, which belong to the protocol active; set data.protocol to active, "
                    "or leave them out"
                )
            return
        if not learns:
            if said:
                raise ValueError(f"{name} learns nothing, so it needs no labels; leave out {', '.join(said)}")
            return
        if self.descriptions is not None and per_image:
            raise ValueError(
                f"{name} has other text features for each image, which descriptions cannot be averaged with; leave "
                "them out"
            )
        if self.acquire is None:
            raise ValueError(
                f"{name} does not say in acquire which images it has labelled; expected one of random, entropy, "
                "coreset, badge, class_guided, or all for every label at once"
            )
        if self.balances and self.acquire not in BALANCED:
            raise ValueError(
                f"{name} balances what {self.acquire} acquires, which leaves nothing to choose from; leave out "
                f"balance, or acquire by {', '.join(BALANCED)}"
            )
        if self.free_labels and self.acquire != "class_guided":
            raise ValueError(f"{name} has free_labels, which belong to acquire: class_guided; leave them out")
        if self.badge and self.acquire != "badge":
            raise ValueError(f"{name} has badge: {self.badge}, which belongs to acquire: badge; leave it out")
        if self.acquire == "class_guided" and per_image:
            raise ValueError(
                f"{name} has other text features for each image, so there are none to guide class_guided with; choose "
                "another acquisition"
            )


def refuse_missing_labels(
    active: ActiveConfig, row: AskingConfig, name: str, data: ClipDataConfig, learns: bool
) -> None:
    """Raise ValueError for a row that asks for labels where there are none, or has nothing to be scored on.

    Args:
        active: the recipe's section.
        row: what the row asks for.
        name: the row's name.
        data: the recipe's datasets.
        learns: whether the row's method has trainables.
    """
    by_person = active.oracle == "file"
    for entry in data.datasets:
        if not entry.labelled and not by_person:
            raise ValueError(
                f"the images of {entry.name} have no labels that active.oracle: labels could read; set active.oracle "
                "to file, so that a person is asked for them"
            )
        if not entry.tested and not learns:
            raise ValueError(
                f"{name} learns nothing, and {entry.name} has no test images to score it on; leave the row out, or "
                "name a folder of test images in the dataset's test"
            )
    if by_person and row.acquire == "all":
        raise ValueError(
            f"{name} takes all labels of the training split at once, and active.oracle is file, which asks a person in "
            "rounds; choose another acquisition, or leave the row out"
        )


def refuse_small_pool(active: ActiveConfig, row: AskingConfig, pool: int, classes: int, where: str) -> None:
    """Raise UserError when a pool of `pool` images is too small for what a row asks for.

    Args:
        active: the recipe's section.
        row: what the row asks for.
        pool: the number of images.
        classes: the number of classes.
        where: the row and the dataset, as the error names them.
    """
    if not row.asks:
        return
    labels = active.labels(classes)
    if labels * active.rounds > pool:
        raise UserError(
            f"{where}: {active.rounds} rounds of {labels} labels are more than the {pool} images of the pool. Set "
            f"active.rounds to at most {pool // labels}, or fewer active.labels_per_round."
        )
    candidates = int(active.candidates * pool)
    if row.balances and candidates < labels:
        raise UserError(
            f"{where}: {active.candidates:g} of {pool} images are {candidates} candidates, fewer than the {labels} "
            f"labels of a round. Set active.candidates to at least {-(-labels * 1000 // pool) / 1000:g}, or fewer "
            "active.labels_per_round."
        )
    clusters = labels * ((3 + active.rounds) if row.free_labels else active.rounds)
    if row.acquire == "class_guided" and clusters > pool:
        raise UserError(
            f"{where}: the last round needs {clusters} clusters of the {pool} images of the pool. Set fewer "
            "active.rounds or active.labels_per_round."
        )
