"""What stands at the head of a benchmark's report: tiles, intervals, the figure of accuracies, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.files.paths import command
from pipeline.metrics.intervals import LEVEL, Interval, wilson
from pipeline.report.headline import Tile
from pipeline.report.look import COLOURS, GRID, MARKERS, STYLE
from pipeline.report.numbers import NONE, amount, fixed, limits
from pipeline.runs.layout import CONFIG

HARMONIC, TARGETS = "HM", "target mean"
MOST = 8  # groups of a dataset in the figure; rounds and targets may be many more
# The settings of a benchmark that are compared most often, by their place in config.yaml.
MAIN = (
    "model.path", "model.dtype", "data.protocol", "data.shots", "data.datasets", "data.targets", "methods", "seeds",
    "train.epochs", "train.global_batch", "train.lr", "train.weight_decay", "train.augment", "train.deepspeed",
)  # fmt: skip

Content = Mapping[str, Any]  # of results.json


def image_count(content: Content, line: Content, group: str) -> int:
    """The test images of a row's group; every seed is tested with the same ones."""
    sizes = [
        sum(unit["groups"][group]["total"])
        for unit in content["units"]
        if (unit["method"], unit["dataset"]) == (line["method"], line["dataset"]) and group in unit["groups"]
    ]
    return min(sizes, default=0)


def line_interval(content: Content, line: Content, group: str) -> Interval | None:
    """Wilson's interval of a row's mean accuracy over the seeds on a group's test images, in percent.

    The seeds share their test images, so n is the number of images, not of predictions.
    """
    spread, images = line["groups"].get(group), image_count(content, line, group)
    return None if spread is None else wilson(spread["mean"] / 100 * images, images)


def headline_of(line: Content) -> tuple[str, float | None, float | None]:
    """Name, mean and deviation of the number by which a row is judged: HM, mean over targets, or its last group."""
    if line["harmonic"] is not None:
        return HARMONIC, line["harmonic"], line["harmonic_of_seeds"]["deviation"]
    if line["target_mean"] is not None:
        return TARGETS, line["target_mean"]["mean"], line["target_mean"]["deviation"]
    if not line["groups"]:
        return "accuracy", None, None
    group, spread = list(line["groups"].items())[-1]
    return f"accuracy, {group}", spread["mean"], spread["deviation"]


def tiles(content: Content, state: Content) -> list[Tile]:
    """The headline: best row of every dataset, its lead over zero-shot, deviation over seeds, images, units."""
    found = []
    for dataset in dict.fromkeys(line["dataset"] for line in content["lines"]):
        own = [line for line in content["lines"] if line["dataset"] == dataset]
        scored = [(line, *headline_of(line)) for line in own]
        known = [(line, name, mean, deviation) for line, name, mean, deviation in scored if mean is not None]
        if not known:
            continue
        best, name, mean, deviation = max(known, key=lambda entry: entry[2] or 0.0)
        about = f"{best['method']}, best of {len(known)} on {dataset}"
        if deviation is not None:
            about += f"; ± {fixed(deviation, 2)} over seeds"
        if best["harmonic"] is None and best["target_mean"] is None:
            interval = line_interval(content, best, list(best["groups"])[-1])
            about += f"; {100 * LEVEL:.0f} %: {limits(interval)}"
        found.append(Tile(name, fixed(mean, 2), about))
        frozen = next((value for line, _, value, _ in known if line["method"] == "zero_shot"), None)
        if frozen is not None and best["method"] != "zero_shot":
            found.append(Tile("over zero-shot", fixed(mean - frozen, 2), f"zero-shot {fixed(frozen, 2)} on {dataset}"))
    images = {
        (line["dataset"], group): image_count(content, line, group)
        for line in content["lines"]
        for group in (list(line["groups"])[-1:] if line.get("paid") else line["groups"])
    }
    found.append(
        Tile("test images", amount(sum(images.values())) if images else NONE, "of all datasets, for each seed")
    )
    if state.get("units"):
        seeds = ", ".join(str(seed) for seed in state.get("seeds", []))
        about = "a unit is a method, a dataset and a seed" + (f"; seeds {seeds}" if seeds else "")
        found.append(Tile("units", f"{state.get('units_done', 0)} of {len(state['units'])}", about))
    return found


def missing(content: Content, state: Content, run: Any) -> list[str]:
    """One sentence for each thing that the page of a whole run would have."""
    found = []
    if not state:
        found.append("run.json is not in the run folder; status, times and versions are unknown.")
    if not (run / CONFIG).is_file():
        found.append(f"{CONFIG} is not in the run folder; settings and model are unknown.")
    labels = {f"{unit['method']}-{unit['dataset']}-s{unit['seed']}" for unit in content["units"]}
    left = [unit for unit in state.get("units", []) if unit not in labels]
    if left:
        named = ", ".join(left[:MOST]) + (f" and {len(left) - MOST} more" if len(left) > MOST else "")
        again = command("run", run / CONFIG)
        found.append(
            f"{len(left)} of {len(state['units'])} units have no result: {named}. `{again}` goes on with them."
        )
    single = sorted({line["method"] for line in content["lines"] if len(_seeds(content, line)) == 1} - {"zero_shot"})
    if single:
        found.append(f"One seed of {', '.join(single)}: there is no deviation.")
    return found


def accuracy_figure(content: Content) -> Figure | None:
    """Draw every row's accuracy with its 95 % interval, one panel per dataset, a marker for each group.

    None where nothing was tested.
    """
    datasets = list(dict.fromkeys(line["dataset"] for line in content["lines"] if line["groups"]))
    if not datasets:
        return None
    rows = [[line for line in content["lines"] if line["dataset"] == dataset] for dataset in datasets]
    columns = min(2, len(datasets))
    lines = -(-len(datasets) // columns)
    high = max(len(own) for own in rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4 * columns + 0.6, (0.34 * high + 0.9) * lines + 0.4), layout="constrained")
        panels = [axes for row in figure.subplots(lines, columns, sharex=True, squeeze=False) for axes in row]
        names: dict[str, Any] = {}
        for axes, dataset, own in zip(panels, datasets, rows, strict=False):
            groups = list(dict.fromkeys(group for line in own for group in line["groups"]))[-MOST:]
            for number, group in enumerate(groups):
                drawn = [(place, line) for place, line in enumerate(own) if group in line["groups"]]
                means = [line["groups"][group]["mean"] for _, line in drawn]
                ends = [
                    line_interval(content, line, group) or (mean, mean)
                    for (_, line), mean in zip(drawn, means, strict=True)
                ]
                names[group] = axes.errorbar(
                    means,
                    [place + 0.5 * (number - (len(groups) - 1) / 2) / len(groups) for place, _ in drawn],
                    xerr=[
                        [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                        [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
                    ],
                    linestyle="",
                    marker=MARKERS[number % len(MARKERS)],
                    color=COLOURS[number % len(COLOURS)],
                    markersize=5,
                    linewidth=1.2,
                )
            axes.set_yticks(range(len(own)), [line["method"] for line in own])
            axes.set_ylim(len(own) - 0.4, -0.6)
            axes.set_title(dataset, fontsize=10, loc="left")
            axes.grid(axis="x", color=GRID, linewidth=0.6)
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("accuracy (percent)")
        for axes in panels[len(datasets) :]:
            axes.set_visible(False)
        figure.legend(list(names.values()), list(names), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _seeds(content: Content, line: Content) -> set[int]:
    return {u["seed"] for u in content["units"] if (u["method"], u["dataset"]) == (line["method"], line["dataset"])}


def groups_of(lines: Sequence[Content]) -> list[str]:
    """The groups of all rows, in the order of the rows."""
    return list(dict.fromkeys(group for line in lines for group in line["groups"]))
