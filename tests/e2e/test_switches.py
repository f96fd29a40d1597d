"""Switches of the recipe that only a whole run shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pipeline.prompts.embedding
import pipeline.prompts.model
import pipeline.sequence.evaluate
from pipeline.adapter import export
from pipeline.adapter.predict import predict
from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.prompts.generation import generate_answers
from pipeline.prompts.pool import fingerprint_of
from pipeline.sequence.run import evaluate_run, run_sequence
from pipeline.sequence.stage import StageTrainer, TrainedStage
from pipeline.training.engine import Engine
from tests.e2e.conftest import MakeRecipe

pytestmark = pytest.mark.e2e
TRAINED = {"train__projector": "trained", "train__lr_projector": 0.05}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage(recipe: Recipe, number: int) -> dict[str, torch.Tensor]:
    return load_file(recipe.run_path / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")


def projector_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("projector."): v for k, v in tensors.items() if k.startswith("projector.")}


def copy_answers(recipe: Recipe) -> dict[str, str]:
    return {str(p.relative_to(recipe.run_path)): p.read_text() for p in recipe.run_path.glob("eval/*/*.jsonl")}


# ------------------------------------------------------------------ train.projector


def test_a_frozen_projector_is_not_in_the_checkpoint_and_a_trained_one_goes_on_from_stage_to_stage(
    make: MakeRecipe,
) -> None:
    frozen = make(tasks=1)
    run_sequence(frozen, stages="train")
    assert not projector_of(stage(frozen, 0))
    trained = make(tasks=2, run_dir=str(frozen.run_path) + "-trained", **TRAINED)
    run_sequence(trained, stages="train")
    base = load_lmm(trained.model).projector().state_dict()
    first, second = (projector_of(stage(trained, number)) for number in range(2))
    assert base.keys() == first.keys() == second.keys()
    for name, value in base.items():
        start, middle, end = value, first[name], second[name]
        # Two Adam steps of 0.05 each move every weight that has a gradient by about 0.1, from where it stood.
        assert 0.05 < (middle - start).abs().max() < 0.11
        assert 0.05 < (end - middle).abs().max() < 0.11


def test_training_the_projector_leaves_every_other_weight_of_the_model_as_it_was(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, changed = StageTrainer.train, set[str]()

    def watched(self: StageTrainer, *given: Any) -> TrainedStage:
        base = {name: weight.clone() for name, weight in self.engine().module.lmm.state_dict().items()}
        trained = train(self, *given)
        after = self.engine().module.lmm.state_dict()
        changed.update(name for name, weight in after.items() if not torch.equal(weight, base[name]))
        return trained

    monkeypatch.setattr(StageTrainer, "train", watched)
    run_sequence(make(tasks=2, **TRAINED), stages="train")
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_every_row_of_the_matrix_is_answered_with_the_projector_of_its_stage(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def watched(lmm: LMM, *args: Any, **kwargs: Any) -> Any:
        used.append(fingerprint_of(lmm.projector().state_dict()))
        return generate_answers(lmm, *args, **kwargs)

    monkeypatch.setattr(pipeline.sequence.evaluate, "generate_answers", watched)
    recipe = make(tasks=2, **TRAINED)
    run_sequence(recipe)
    base = fingerprint_of(load_lmm(recipe.model).projector().state_dict())
    first, second = (fingerprint_of(projector_of(stage(recipe, number))) for number in range(2))
    assert used[:5] == [base, base, first, second, second]
    assert set(used[5:]) <= {second}  # with the task told, where questions were misrouted
    assert len({base, first, second}) == 3


def test_a_restart_and_a_later_evaluation_find_the_trained_projector_again(make: MakeRecipe) -> None:
    recipe = make(tasks=2, **TRAINED)
    run_sequence(recipe)
    answers, last = copy_answers(recipe), stage(recipe, 1)
    shutil.rmtree(recipe.run_path / "stages" / "02-T1")
    shutil.rmtree(recipe.run_path / "eval")
    run_sequence(recipe, stages="train")
    redone = stage(recipe, 1)
    assert all(torch.equal(redone[name], last[name]) for name in last)
    evaluate_run(recipe.run_path)
    assert copy_answers(recipe) == answers


def counted_generations(make_recipe: Callable[[], Recipe], monkeypatch: pytest.MonkeyPatch) -> int:
    generated: list[int] = []
    join = GreedyDecoder.join

    def counted(self: GreedyDecoder[Row], prompts: Prompts, rows: list[Row]) -> list[Row]:
        generated.append(len(rows))
        return join(self, prompts, rows)

    with monkeypatch.context() as patch:
        patch.setattr(GreedyDecoder, "join", counted)
        run_sequence(make_recipe())
    return sum(generated)


def test_an_answer_given_with_another_projector_is_not_reused(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"method__name": "independent", "evaluate__zero_shot": False, "tasks": 2}
    assert counted_generations(lambda: make(**fields), monkeypatch) == 2 * 4
    trained = {**fields, **TRAINED, "seed": 1}
    assert counted_generations(lambda: make(**trained), monkeypatch) == 3 * 4


def test_prediction_and_export_take_the_trained_projector_along(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tasks=1, **TRAINED)
    run_sequence(recipe, stages="train")
    loaded: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(LMM, "load_projector", lambda self, values: loaded.append(values))
    predict(recipe.run_path, None, "what?")
    export(recipe.run_path, tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "projector.safetensors")
    expected = fingerprint_of(projector_of(stage(recipe, 0)))
    assert [fingerprint_of(values) for values in (*loaded, exported)] == [expected, expected]


def test_a_model_without_a_projector_cannot_train_one(make: MakeRecipe) -> None:
    lmm = load_lmm(make(tasks=1).model)
    del lmm.model.model.multi_modal_projector
    with pytest.raises(UserError, match=r"no image projector.*train\.projector to frozen"):
        lmm.train_projector()


# ------------------------------------------------------------------ learning rates


@pytest.mark.parametrize("group", ["prompt", "head", "projector"])
def test_each_group_has_its_own_learning_rate(make: MakeRecipe, group: str) -> None:
    rates = {f"train__lr_{name}": 0.05 if name == group else 1e-9 for name in ("prompt", "head", "projector")}
    recipe = make(tasks=1, train__projector="trained", **rates)
    start: dict[str, torch.Tensor] = {}
    begin = Engine.restart

    def remembered(self: Engine, values: dict[str, torch.Tensor]) -> None:
        start.update(values)
        begin(self, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "restart", remembered)
        run_sequence(recipe, stages="train")
    moved = {
        name.partition(".")[0]
        for name, value in stage(recipe, 0).items()
        if name != "prototype" and (value - start[name]).abs().max() > 1e-3
    }
    assert moved == {group}


# ------------------------------------------------------------------ insertion, text-only samples, scores ahead


@pytest.mark.parametrize("insertion", ["after_bos", "before_image"])
def test_the_recipes_insertion_holds_in_training_and_in_evaluation(
    make: MakeRecipe, insertion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {"training": set(), "evaluation": set()}
    for kind, place in (("training", pipeline.prompts.model), ("evaluation", pipeline.prompts.embedding)):
        original = place.insertion_place

        def watched(*args: Any, kind: str = kind, original: Any = original) -> torch.Tensor:
            seen[kind].add(args[2])
            return original(*args)

        monkeypatch.setattr(place, "insertion_place", watched)
    recipe = make(tasks=1, method__insertion=insertion)
    run_sequence(recipe)
    assert seen == {"training": {insertion}, "evaluation": {insertion}}
    seen["evaluation"].clear()
    predict(recipe.run_path, None, "what?")
    assert seen["evaluation"] == {insertion}


@pytest.mark.parametrize(("text_only", "sets"), [("insert", 1), ("skip", 0)])
def test_text_only_questions_are_answered_with_or_without_sets(make: MakeRecipe, text_only: str, sets: int) -> None:
    recipe = make(tasks=1, method__text_only=text_only)
    run_sequence(recipe)
    answered = lines(recipe.run_path / "eval" / "after-01" / "T0.jsonl")
    has_image = load_file(Path(recipe.data.prepared) / "T0" / "test" / "keys.safetensors")["has_image"].tolist()
    assert 0 in has_image and 1 in has_image
    assert [len(line["selected"]) for line in answered] == [1 if flag else sets for flag in has_image]


def test_scores_ahead_give_the_forward_transfer(make: MakeRecipe) -> None:
    result = run_sequence(make(tasks=3, evaluate__ahead=True))
    ahead, zero_shot = result["ahead"], result["zero_shot"]
    assert ahead[0] is None
    expected = sum(ahead[task] - zero_shot[task] for task in (1, 2)) / 2
    assert result["metrics"]["forward_transfer"] == pytest.approx(expected)
    assert len(result["metrics"]["retention_per_task"]) == 3


def test_a_run_without_scores_ahead_has_no_forward_transfer(make: MakeRecipe) -> None:
    result = run_sequence(make(tasks=2))
    assert "ahead" not in result
    assert result["metrics"]["forward_transfer"] is None


# ------------------------------------------------------------------ selection


def test_the_oracle_gives_every_sample_its_own_tasks_set_last(make: MakeRecipe) -> None:
    recipe = make(tasks=3, method__selection="oracle", method__k=2)
    run_sequence(recipe)
    for number in range(3):
        answered = lines(recipe.run_path / "eval" / "after-03" / f"T{number}.jsonl")
        assert {line["selected"][-1] for line in answered} == {f"T{number}"}
        assert {len(line["selected"]) for line in answered} == {min(2, number + 1)}
    with pytest.raises(UserError, match="needs the task"):
        predict(recipe.run_path, None, "what?")
    assert predict(recipe.run_path, None, "what?", "T1")["selected"][-1] == "T1"


def test_a_run_from_before_a_switch_existed_goes_on_with_its_default(make: MakeRecipe) -> None:
    recipe = make(tasks=1)
    run_sequence(recipe, stages="train")
    config = recipe.run_path / "config.yaml"
    older = yaml.safe_load(config.read_text())
    for name in ("selection", "insertion", "text_only"):
        del older["method"][name]
    config.write_text(yaml.safe_dump(older))
    run_sequence(recipe, stages="train")
    with pytest.raises(UserError, match=r"method\.insertion: after_bos there, before_image now"):
        run_sequence(make(tasks=1, method__insertion="before_image"), stages="train")


def test_a_run_trained_without_evaluation_is_finished_by_evaluating(make: MakeRecipe) -> None:
    recipe = make(tasks=1)
    state = recipe.run_path / "run.json"
    run_sequence(recipe, stages="train")
    assert json.loads(state.read_text())["status"] == "trained"
    evaluate_run(recipe.run_path)
    assert json.loads(state.read_text())["status"] == "done"
