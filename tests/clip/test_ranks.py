"""The same recipe learns the same prompts on any number of ranks and under any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.benchmark import prepare_benchmark
from tests.clip import project
from tests.clip.project import fields, make_project, recipe
from tests.processes import torchrun

LIMIT_S = 600
METHODS: list[Any] = [
    {"name": "coop", "options": {"length": 2}, "train": {"augment": "none"}},
    {"name": "cocoop", "options": {"length": 2, "words": None}, "train": {"global_batch": 3, "augment": "none"}},
    {"name": "kgcoop", "options": {"length": 2}},
    {"name": "vpt", "options": {"length": 2, "depth": 2}},
    {"name": "maple", "options": {"length": 2, "depth": 3}},
    {"name": "mpl", "options": {"length": 1, "depth": 3}},
    {
        "name": "promptsrc",
        "method": "ivlp",
        "options": {"length": 2, "length_vision": 2, "depth": 2},
        "consistency": {"templates": ["a {}."]},
        "average": {"mean": 2, "deviation": 1},
    },
]
ONE_SEED: dict[str, Any] = {"seeds": [1]}


def launch(folder: Path, ranks: int, methods: list[Any], stages: dict[str, dict[str, Any]]) -> None:
    """Run the recipe once per entry of `stages` (changes of train) in one launch."""
    recipes = [
        fields(folder, *methods, name=f"{ranks}-{name}", train=train, **ONE_SEED) for name, train in stages.items()
    ]
    job = folder / f"{ranks}.json"
    job.write_text(json.dumps({"recipes": recipes}))
    torchrun(["-m", "tests.clip.worlds", str(job)], ranks, LIMIT_S)


def losses(folder: Path, run: str, method: str) -> list[float]:
    lines = (folder / "runs" / run / "units" / f"{method}-toys-s1" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


QUICK = ("mpl",)
OTHERS = ("coop", "cocoop", "promptsrc", "kgcoop", "vpt", "maple")


@pytest.mark.gloo
@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_ranks_and_zero_stages_do_not_change_what_is_learned(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    methods = [entry for entry in METHODS if entry["name"] in names]
    prepare_benchmark(recipe(folder, *methods, **ONE_SEED), progress=False)
    stages = {str(stage): {"deepspeed": f"ds_configs/zero{stage}.json"} for stage in (0, 2, 3)}
    launch(folder, 1, methods, {"3": stages["3"], "0": stages["0"]})
    launch(folder, 2, methods, {"2": stages["2"], "3": stages["3"], "2-cut": {**stages["2"], "micro_batch": 1}})
    expected = json.loads((folder / "runs" / "1-0" / "results.json").read_text())
    for run in ("1-3", "2-2", "2-3", "2-2-cut"):
        for method in names:
            assert losses(folder, run, method) == pytest.approx(losses(folder, "1-0", method), abs=1e-5), (run, method)
            found, wanted = (
                load_file(folder / "runs" / r / "units" / f"{method}-toys-s1" / "prompts.safetensors")
                for r in (run, "1-0")
            )
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                worst = float((found[name] - value).abs().max())
                assert worst < 1e-5, f"{run}, {method}: {name} differs by {worst}"
        assert json.loads((folder / "runs" / run / "results.json").read_text())["units"] == expected["units"], run


DPL: dict[str, Any] = {
    "name": "dpl",
    "search": {"options": [0, 1, 2], "epochs": 2, "lr": 0.05, "alpha_lr": 0.05, "validation_batch": 5},
}


def searched(folder: Path, run: str) -> tuple[list[list[float]], dict[str, Any]]:
    """Both losses of every step of a run's search, and what it found."""
    (search,) = (folder / "runs" / run / "searches").iterdir()
    lines = [json.loads(line) for line in (search / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["validation"]] for line in lines], json.loads((search / "search.json").read_text())


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_and_zero_stages_do_not_change_what_a_search_finds(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(project.IMAGES, "val", 3)  # nine of base classes: the last batch of a pass is filled
        folder = make_project(tmp_path)
    prepare_benchmark(recipe(folder, DPL, **ONE_SEED), progress=False)
    stages = {str(stage): {"deepspeed": f"ds_configs/zero{stage}.json"} for stage in (0, 2, 3)}
    launch(folder, 1, [DPL], stages)
    launch(folder, 2, [DPL], {**stages, "2-cut": {**stages["2"], "micro_batch": 1}})
    launch(folder, 3, [DPL], {"2": stages["2"]})
    wanted_losses, wanted = searched(folder, "1-0")
    assert any(any(lengths) for lengths in wanted["lengths"].values())
    prompts = load_file(folder / "runs" / "1-0" / "units" / "dpl-toys-s1" / "prompts.safetensors")
    for run in ("1-2", "1-3", "2-0", "2-2", "2-3", "2-2-cut", "3-2"):
        found_losses, found = searched(folder, run)
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(wanted_losses), atol=1e-5, rtol=0, msg=run)
        for tower, alphas in wanted["alphas"].items():
            torch.testing.assert_close(
                torch.tensor(found["alphas"][tower]), torch.tensor(alphas), atol=1e-5, rtol=0, msg=f"{run} {tower}"
            )
        assert found["lengths"] == wanted["lengths"]
        assert losses(folder, run, "dpl") == pytest.approx(losses(folder, "1-0", "dpl"), abs=1e-5), run
        values = load_file(folder / "runs" / run / "units" / "dpl-toys-s1" / "prompts.safetensors")
        assert values.keys() == prompts.keys()
        for name, value in prompts.items():
            assert float((values[name] - value).abs().max()) < 1e-5, f"{run}: {name}"
