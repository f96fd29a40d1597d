"""Results of a benchmark: one row per unit, and means over seeds and datasets, in percent."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.clip.active.selection import Selection
from pipeline.clip.benchmark.scores import BaseToNew, Counts, Spread, average, base_to_new
from pipeline.clip.images.classes import UNLABELLED

BASE, NEW = "base", "new"
Row = tuple[str, str, int]  # method, dataset and seed of a unit


@dataclass(frozen=True)
class RoundFacts:
    """What was labelled up to and with one round of a unit that asks for labels.

    `labels` images have a label; `paid` were asked for, those of none of the classes too, the others are guesses.
    Shares of the largest and the smallest class are of the labelled images, in percent.
    """

    labels: int
    paid: int
    classes_without: int
    largest_share: float
    smallest_share: float

    @classmethod
    def of(cls, selections: Sequence[Selection], classes: int) -> RoundFacts:
        """The facts after these rounds."""
        said = [label for selection in selections for label in selection.labels]
        labels = [label for label in said if label != UNLABELLED]
        counts = [labels.count(c) for c in range(classes)]
        shares = [100 * count / max(1, len(labels)) for count in counts]
        paid = len(said) - sum(len(selection.free) for selection in selections)
        return cls(len(labels), paid, counts.count(0), max(shares), min(shares))


@dataclass(frozen=True)
class UnitResult:
    """The counts of one method, dataset and seed by group: base, new, all, or the name of a target dataset.

    `names` are the classes of each group, in the order of its counts.
    """

    method: str
    dataset: str
    seed: int
    groups: dict[str, Counts]
    names: dict[str, tuple[str, ...]]
    rounds: tuple[RoundFacts, ...] = ()  # of each round, in the order of the groups; none without rounds

    @property
    def area(self) -> float | None:
        """The area under accuracy over labels paid, divided by the labels, in percent.

        None without rounds, or without test images.
        """
        if not self.rounds or not self.groups:
            return None
        points = [(f.paid, 100 * c.accuracy) for f, c in zip(self.rounds, self.groups.values(), strict=True)]
        width = points[-1][0] - points[0][0]
        if not width:
            return statistics.fmean(accuracy for _, accuracy in points)
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)) / width

    @property
    def row(self) -> Row:
        """Method, dataset and seed of the unit."""
        return self.method, self.dataset, self.seed

    @property
    def target_mean(self) -> float | None:
        """The mean accuracy over the target datasets in percent, without the source dataset; None without targets."""
        if self.dataset not in self.groups:
            return None  # groups are base and new, or all: not named by dataset
        targets = [100 * counts.accuracy for name, counts in self.groups.items() if name != self.dataset]
        return statistics.fmean(targets) if targets else None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of results.json, with accuracies in percent and class names beside the counts."""
        groups = {
            name: {"accuracy": 100 * counts.accuracy, **asdict(counts), "names": self.names[name]}
            for name, counts in self.groups.items()
        }
        return {
            "method": self.method,
            "dataset": self.dataset,
            "seed": self.seed,
            "groups": groups,
            "target_mean": self.target_mean,
            **({"rounds": [asdict(facts) for facts in self.rounds], "area": self.area} if self.rounds else {}),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> UnitResult:
        """The result that `to_json` wrote; KeyError or TypeError when the object has another form."""
        groups = {
            name: Counts(tuple(counts["right"]), tuple(counts["total"])) for name, counts in found["groups"].items()
        }
        names = {name: tuple(counts["names"]) for name, counts in found["groups"].items()}
        rounds = tuple(RoundFacts(**facts) for facts in found.get("rounds", ()))
        return cls(found["method"], found["dataset"], found["seed"], groups, names, rounds)


@dataclass(frozen=True)
class Line:
    """One method on one dataset: accuracy by group over the seeds, in percent."""

    method: str
    dataset: str
    groups: dict[str, Spread]
    halves: BaseToNew | None = None  # only where there are base and new classes
    target_mean: Spread | None = None  # over each seed's mean over the targets; only where there are targets
    area: Spread | None = None  # under accuracy over labels paid; only where there are rounds
    paid: tuple[float, ...] = ()  # labels paid after each round, mean over the seeds
    classes_without: tuple[float, ...] = ()  # classes without a label after each round, mean over the seeds

    def to_json(self) -> dict[str, Any]:
        """The JSON object of results.json; `harmonic` is the harmonic mean of the mean base and new accuracies."""
        groups = {name: asdict(spread) for name, spread in self.groups.items()}
        harmonic = {
            "harmonic": self.halves.harmonic if self.halves else None,
            "harmonic_of_seeds": asdict(self.halves.harmonic_of_seeds) if self.halves else None,
        }
        targets = asdict(self.target_mean) if self.target_mean else None
        return {
            "method": self.method,
            "dataset": self.dataset,
            "groups": groups,
            "target_mean": targets,
            **harmonic,
        } | (
            {
                "area": asdict(self.area) if self.area else None,
                "paid": list(self.paid),
                "classes_without": list(self.classes_without),
            }
            if self.paid
            else {}
        )


def lines(results: Sequence[UnitResult]) -> list[Line]:
    """One line for each method and dataset, in the order of the results."""
    found = []
    for method, dataset in dict.fromkeys((result.method, result.dataset) for result in results):
        units = [result for result in results if (result.method, result.dataset) == (method, dataset)]
        groups = {
            group: Spread.of([100 * unit.groups[group].accuracy for unit in units if group in unit.groups])
            for group in dict.fromkeys(group for unit in units for group in unit.groups)
        }
        halves = None
        if {BASE, NEW} <= groups.keys():
            halves = base_to_new([tuple(100 * unit.groups[half].accuracy for half in (BASE, NEW)) for unit in units])  # type: ignore[misc]
        targets = [unit.target_mean for unit in units if unit.target_mean is not None]
        areas = [unit.area for unit in units if unit.area is not None]
        rounds = list(zip(*(unit.rounds for unit in units if unit.rounds), strict=True))
        found.append(
            Line(
                method,
                dataset,
                groups,
                halves,
                Spread.of(targets) if targets else None,
                Spread.of(areas) if areas else None,
                tuple(statistics.fmean(facts.paid for facts in seeds) for seeds in rounds),
                tuple(statistics.fmean(facts.classes_without for facts in seeds) for seeds in rounds),
            )
        )
    return found


def averages(found: Sequence[Line]) -> dict[str, dict[str, float]]:
    """By method: the mean of each group over the datasets, and both harmonic means (docs/design.md 5.13).

    Only groups that every dataset of the method has: base and new, all, or the target datasets with their mean.
    """
    result: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(line.method for line in found):
        own = [line for line in found if line.method == method]
        shared = [group for group in own[0].groups if all(group in line.groups for line in own)]
        means = {group: statistics.fmean(line.groups[group].mean for line in own) for group in shared}
        targets = [line.target_mean.mean for line in own if line.target_mean is not None]
        if len(targets) == len(own):
            means["target_mean"] = statistics.fmean(targets)
        halves = {line.dataset: line.halves for line in own if line.halves is not None}
        if len(halves) == len(own):
            whole = average(halves)
            means |= {name: getattr(whole, name) for name in ("harmonic_of_means", "mean_of_harmonics")}
        result[method] = means
    return result


def results_json(protocol: str, results: Sequence[UnitResult]) -> dict[str, Any]:
    """The content of results.json."""
    found = lines(results)
    return {
        "protocol": protocol,
        "units": [result.to_json() for result in results],
        "lines": [line.to_json() for line in found],
        "averages": averages(found),
    }


def results_table(title: str, content: dict[str, Any]) -> Table:
    """The lines of results.json for a terminal: mean and deviation over the seeds, and the averages over datasets."""
    found = content["lines"]
    groups = list(dict.fromkeys(group for line in found for group in line["groups"]))
    harmonic = any(line["harmonic"] is not None for line in found)
    targets = any(line["target_mean"] is not None for line in found)
    several = len({line["dataset"] for line in found}) > 1
    unscored = any(not line["groups"] for line in found)  # images of one's own without a test split
    table = Table(box=SIMPLE_HEAD, title=title, caption="percent; mean and deviation over the seeds; HM of the means")
    for title_ in ("method", *(("dataset",) if several else ())):
        table.add_column(title_, no_wrap=True)
    for title_ in (
        *groups,
        *(("target mean",) if targets else ()),
        *(("HM", "HM of seeds") if harmonic else ()),
        *(("labels paid", "classes without a label") if unscored else ()),
        "seeds",
    ):
        table.add_column(title_, justify="right", no_wrap=True)
    for line in found:
        cells = [line["method"], *([line["dataset"]] if several else [])]
        cells += [spread_text(line["groups"].get(group)) for group in groups]
        if targets:
            cells.append(spread_text(line["target_mean"]))
        if harmonic:
            both = line["harmonic"], line["harmonic_of_seeds"]
            cells += [f"{both[0]:.2f}" if both[0] is not None else "", spread_text(both[1])]
        if unscored:
            ends = (line.get(name, []) for name in ("paid", "classes_without"))
            cells += [f"{numbers[-1]:g}" if numbers else "" for numbers in ends]
        table.add_row(*cells, str(len(_seeds(content, line))))
    if several:
        table.add_section()
        for method, means in content["averages"].items():
            cells = [method, "average", *(f"{means[group]:.2f}" if group in means else "" for group in groups)]
            if targets:
                cells.append(f"{means['target_mean']:.2f}" if "target_mean" in means else "")
            if harmonic:
                ways = means.get("harmonic_of_means"), means.get("mean_of_harmonics")
                cells += [f"{ways[0]:.2f} (mean of HMs {ways[1]:.2f})" if None not in ways else "", ""]
            cells += ["", ""] if unscored else []
            table.add_row(*cells, "")
    return table


def _seeds(content: dict[str, Any], line: dict[str, Any]) -> set[int]:
    """The seeds of a line's units."""
    row = line["method"], line["dataset"]
    return {unit["seed"] for unit in content["units"] if (unit["method"], unit["dataset"]) == row}


def spread_text(spread: dict[str, Any] | None) -> str:
    """Mean and deviation over seeds as text: the mean alone for one seed, empty for None."""
    if spread is None:
        return ""
    if spread["deviation"] is None:
        return f"{spread['mean']:.2f}"
    return f"{spread['mean']:.2f} ± {spread['deviation']:.2f}"
