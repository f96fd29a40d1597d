"""A run on the embedded tasks whose test questions a real vLLM answers: its predictions are those of a replica."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.sequence.run import run_sequence
from pipeline.serve.front.process import EngineProcess, vllm_process
from pipeline.serve.options import ENGINE_KEY_VARIABLE, EngineOptions
from tests.e2e.test_divided import predictions
from tests.vllm.models import save_loadable
from tests.vllm.test_end_to_end import ENGINE, KEY, PROGRAM, SMALL

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

TASKS = ("Colours", "Charts", "Boxes")
EACH = 100


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """nano with a few samples and steps, on the model that vLLM loads."""
    folder = tmp_path_factory.mktemp("nano")
    tasks = [{"name": name, "metric": "exact", "limit_train": 16, "limit_test": EACH} for name in TASKS]
    changes = {
        "model.path": str(save_loadable(folder).llava),
        "data.root": str(folder / "drawn"),
        "data.prepared": str(folder / "data"),
        "data.tasks": json.dumps(tasks),
        "run_dir": str(folder / "runs" / "one"),
        "train.steps": 4,
        "train.lr_prompt": 0.5,
        "train.processes": 1,
        "train.deepspeed": "ds_configs/zero0.json",
        "tracking.enabled": "false",
        "method.insertion": "after_image",
    }
    found = load_recipe("nano", [f"{name}={value}" for name, value in changes.items()])
    prepare(found, progress=False)
    return found


@pytest.fixture(scope="module")
def engine(recipe: Recipe) -> Iterator[EngineProcess]:
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is missing; `make test-vllm` installs it")
    folder = Path(recipe.data.root).parent
    recipe.dump_yaml(folder / "mine.yaml")
    export_checkpoint(folder / "mine.yaml", folder / "parts", "parts")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENGINE, ENGINE_KEY_VARIABLE: KEY}.items():
            patch.setenv(name, value)
        options = EngineOptions(program=PROGRAM, arguments=tuple(shlex.split(SMALL)), form="parts")
        process = vllm_process(folder / "parts", options, "m", recipe.model.dtype, 8)
        try:
            process.start()
            yield process
        finally:
            process.stop()


def test_predictions_are_those_of_a_replica(recipe: Recipe, engine: EngineProcess) -> None:
    evaluate = recipe.evaluate.model_copy(update={"engine": "vllm", "vllm_url": engine.url, "batch": 8})
    run_sequence(recipe.model_copy(update={"evaluate": evaluate}))
    served = predictions(recipe.run_path)
    lines = [line for content in served.values() for line in content.splitlines()]
    assert len(lines) >= len(TASKS) * EACH and len({json.loads(line)["prediction"] for line in lines}) > 20
    for place in served:
        (recipe.run_path / place).unlink()
    run_sequence(recipe, stages="evaluate")
    assert predictions(recipe.run_path) == served
