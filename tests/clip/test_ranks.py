"""The same recipe learns the same prompts on any number of ranks and under any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from data_prep.benchmark import prepare_benchmark
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


QUICK = ("coop", "cocoop", "mpl", "promptsrc")
OTHERS = ("kgcoop", "vpt", "maple")


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
