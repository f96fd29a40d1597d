"""A model on two ranks answers as a whole one does, and each rank holds about half of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.load import load_recipe
from pipeline.config.models import ModelConfig
from pipeline.config.train import ZERO3
from pipeline.errors import UserError
from pipeline.planning import scaling
from pipeline.planning.auto import fit_to_memory, fits
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import GIB, Tokens
from pipeline.planning.replicas import Division, ranks_per_replica
from pipeline.planning.workload import Workload
from tests import tiny
from tests.backbones.tiny_families import FAMILIES
from tests.processes import torchrun
from tests.sequence.divided import STOPPED
from tests.training.worlds import KEY_WIDTH, make_recipe

LIMIT_S = 300
KINDS = ("llava", "qwen2_5_vl", "internvl")
DEEP = "deep alone"  # of six layers; the others have two
OTHERS = [kind for kind in FAMILIES if kind not in KINDS]
MODULES = ("none", "rows", "rows, shared images", "rows behind the image", "grown", "prefix", "low rank")


class Done:
    """What two ranks left behind."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        job = {"models": {kind: str(path) for kind, path in models.items()}, "out": str(folder)}
        (folder / "job.json").write_text(json.dumps(job))
        torchrun(["-m", "tests.sequence.divided", str(folder / "job.json")], 2, LIMIT_S)
        self.folder, self.models = folder, models
        self.results: dict[str, Any] = json.loads((folder / "results.json").read_text())

    def predictions(self, kind: str, modules: str, by: str) -> str:
        return (self.folder / kind / modules / by / "a.jsonl").read_text()

    def require_equal(self, kind: str, modules: str) -> None:
        assert self.results[kind]["buffers"] == [True, True]  # hooks on an embedding read its scale on every rank
        assert self.predictions(kind, modules, "divided") == self.predictions(kind, modules, "whole")
        if modules == STOPPED:
            assert self.predictions(kind, modules, "stopped") == self.predictions(kind, modules, "whole")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    models = {kind: FAMILIES[kind](tmp_path_factory.mktemp("models") / kind) for kind in KINDS}
    models[DEEP] = tiny.save_llava(tmp_path_factory.mktemp("models") / "deep", tied=True, layers=6)
    return Done(tmp_path_factory.mktemp("out"), models)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("kind", "modules"), [*((kind, modules) for kind in KINDS for modules in MODULES), (DEEP, "none")]
)
def test_the_predictions_are_those_of_a_whole_model(done: Done, kind: str, modules: str) -> None:
    done.require_equal(kind, modules)
    answers = {json.loads(line)["prediction"] for line in done.predictions(kind, modules, "whole").splitlines()}
    assert len(answers) > 1


@pytest.mark.gloo
def test_each_rank_holds_about_half_of_the_weights_and_of_keys_and_values(done: Done) -> None:
    found = done.results[DEEP]
    assert max(found["held"]) < 0.6 * found["whole"]
    assert found["cached"] == pytest.approx([found["cached whole"] / 2] * 2, rel=0.1)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", [*KINDS, DEEP])
def test_the_plan_says_what_the_ranks_hold(done: Done, kind: str) -> None:
    found = done.results[kind]
    division = Division.of(meta_model(ModelConfig(path=str(done.models[kind]), dtype="float32")), 2)
    assert division.held == pytest.approx(max(found["held"]), rel=0.01)
    assert division.layers == pytest.approx(max(found["cached"]) / found["cached whole"], rel=0.1)


@pytest.mark.gloo
def test_an_evaluation_that_was_stopped_asks_only_what_is_missing(done: Done) -> None:
    for kind in KINDS:
        found = done.results[kind][STOPPED]
        assert 0 < found["asked again"] < found["asked"], kind


@pytest.mark.gloo
def test_operations_are_those_of_the_whole_model(done: Done) -> None:
    for kind, found in done.results.items():
        for modules in found.keys() & set(MODULES):
            for whole, divided in found[modules]["operations"]:  # on either rank
                assert divided == whole > 0, f"{kind}, {modules}"


@pytest.mark.gloo
@pytest.mark.slow
def test_every_other_family_answers_as_a_whole_model_does(tmp_path: Path) -> None:
    models = {kind: FAMILIES[kind](tmp_path / kind) for kind in OTHERS}
    (tmp_path / "out").mkdir()
    found = Done(tmp_path / "out", models)
    for kind in OTHERS:
        for modules in found.results[kind].keys() & set(MODULES):
            found.require_equal(kind, modules)


@pytest.mark.parametrize(
    ("ranks", "node", "shards", "quantization", "said"),
    [
        (1, 1, "auto", "none", "this run has one; start more"),
        (6, 6, 4, "none", "6 ranks cannot be divided into models on 4 ranks each; set it to one of 2, 3, 6"),
        (2, 2, 4, "none", "set it to one of 2, or start"),
        (4, 1, "auto", "none", "set it to a number of ranks that divides 4"),
        (2, 2, "auto", "nf4", "not possible with model.quantization nf4"),
    ],
)
def test_what_cannot_be_divided_is_refused(ranks: int, node: int, shards: Any, quantization: Any, said: str) -> None:
    evaluate = EvaluateConfig(engine="sharded", shards=shards)
    with pytest.raises(UserError, match=said):
        ranks_per_replica(evaluate, ModelConfig(path="none", quantization=quantization), ranks, node)


def test_the_ranks_of_a_node_have_one_model_together_unless_the_recipe_says_otherwise() -> None:
    model, whole = ModelConfig(path="none"), EvaluateConfig()
    assert ranks_per_replica(whole, model, 16, 8) == 1
    assert ranks_per_replica(EvaluateConfig(engine="sharded"), model, 16, 8) == 8
    assert ranks_per_replica(EvaluateConfig(engine="sharded"), model, 2, 8) == 2
    assert ranks_per_replica(EvaluateConfig(engine="sharded", shards=16), model, 16, 8) == 16


def test_the_plan_divides_model_and_cache(tmp_path: Path) -> None:
    model = tiny.save_llava(tmp_path / "llava", layers=8)

    def planned(engine: str, deepspeed: str) -> dict[str, int]:
        recipe = make_recipe(
            model,
            evaluate={"engine": engine, "shards": 4 if engine == "sharded" else "auto"},
            train__deepspeed=f"ds_configs/{deepspeed}.json",
            train__global_batch=8,
        )
        work, tokens = Workload.of(recipe, KEY_WIDTH), Tokens(16, 20, 4, "given")
        plan = plan_memory(work, 8, meta_model(recipe.model), tokens, node=8)
        return {entry.name: entry.evaluation for entry in plan.entries}

    whole, divided = planned("replicas", "zero3"), planned("sharded", "zero3")
    assert divided["evaluation replica"] < 0.4 * whole["evaluation replica"]
    assert divided["activations"] < whole["activations"]
    # The model that trains under ZeRO-2 is whole on each rank, and the divided one stands beside it.
    assert planned("sharded", "zero2")["evaluation replica"] == divided["evaluation replica"]
    assert planned("replicas", "zero2")["evaluation replica"] == 0


def test_a_72b_is_trained_and_evaluated_on_eight_gpus_of_80_gb() -> None:
    *_, (_, model) = scaling.models()
    work = Workload.of(load_recipe("coin_llava15_7b"), KEY_WIDTH)
    whole, divided = (scaling.plan(work.evaluated_by(engine), model, 8, ZERO3) for engine in ("replicas", "sharded"))
    assert not fits(whole.evaluation, 80 * GIB)
    assert fits(divided.evaluation, 80 * GIB) and fits(divided.training, 80 * GIB)


def test_a_run_whose_answers_do_not_fit_is_told_what_divides_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tiny.save_llava(tmp_path / "llava"), train__deepspeed="auto", evaluate__batch=100_000)
    work, model, tokens = Workload.of(recipe, KEY_WIDTH), meta_model(recipe.model), Tokens(16, 20, 4, "given")
    fit_to_memory(work, 2, model, tokens, 2 * GIB, node=2)
    assert "lower evaluate.batch, or set evaluate.engine=sharded (" in caplog.text
    caplog.clear()
    fit_to_memory(work, 1, model, tokens, 2 * GIB, node=1)
    assert "lower evaluate.batch." in caplog.text
