"""Runs whose tasks are recognised by closed-form routers: trained, evaluated, resumed, exported, and changed midway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.edit import prune
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.config.load import load_recipe, load_run
from pipeline.config.recipe import Recipe
from pipeline.config.yaml_file import CONFIG
from pipeline.errors import UserError
from pipeline.runs.layout import REPLACING_ROUTING
from pipeline.sequence.run import evaluate_run, run_sequence
from tests.e2e.conftest import MakeRecipe
from tests.processes import torchrun

pytestmark = pytest.mark.e2e
SHOWN = ("selected", "similarity")
RANDOM = {"name": "random_ridge", "width": 32}


def slow(router: str) -> Any:
    return pytest.param(router, marks=pytest.mark.slow)


def with_router(make: MakeRecipe, router: Any, tasks: int = 3, **method: Any) -> Recipe:
    return make(tasks=tasks, method={"prompt_length": 2, "router": router, "k": 2, **method})


def stage(run: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")


@pytest.mark.parametrize("router", ["mean", slow("centres"), slow("ridge"), RANDOM], ids=str)
def test_a_run_is_trained_evaluated_exported_and_answers_by_its_router(
    make: MakeRecipe, tmp_path: Path, router: Any
) -> None:
    recipe = with_router(make, router, share=0.5, unfamiliar="flag")
    matrix = run_sequence(recipe)
    assert matrix["stages"] == 3 and set(matrix["routing"]) >= {"accuracy"}
    tensors = stage(recipe.run_path, 1)
    assert not any(name.startswith("head.") for name in tensors)
    assert tensors["router.keys.text"].dtype == torch.float16 and tensors["router.keys.has_image"].dtype == torch.bool
    export(recipe.run_path, tmp_path / "adapter")
    prune(tmp_path / "adapter", ["T1"], tmp_path / "smaller")
    asked = [Question(f"what of {number}?", None) for number in range(3)]
    one, other = (Answerer(source_of(folder)).answer(asked, 3) for folder in (recipe.run_path, tmp_path / "adapter"))
    assert [a.similarity for a in one] == [a.similarity for a in other]
    for answer in other:
        assert answer.probability is not None and sum(answer.probability.values()) == pytest.approx(1.0, abs=1e-3)
        assert answer.unfamiliar in (True, False)
    assert set(Answerer(source_of(tmp_path / "smaller")).answer(asked, 3)[0].similarity) == {"T0", "T2"}


def test_a_further_task_leaves_the_files_of_earlier_stages_as_they_were(make: MakeRecipe) -> None:
    first = with_router(make, RANDOM, tasks=2, share=0.3)
    run_sequence(first)
    before = {path: path.read_bytes() for path in (first.run_path / "stages").rglob("*.safetensors")}
    more = with_router(make, RANDOM, tasks=3, share=0.3)
    more.dump_yaml(first.run_path / CONFIG)
    run_sequence(more)
    assert all(path.read_bytes() == content for path, content in before.items()) and len(before) == 2


@pytest.mark.gloo
def test_two_ranks_learn_and_select_as_one_does(make: MakeRecipe, tmp_path: Path) -> None:
    runs = []
    for ranks in (1, 2):
        recipe = with_router(make, RANDOM, share=0.3).model_copy(update={"run_dir": str(tmp_path / f"run-{ranks}")})
        recipe.dump_yaml(tmp_path / f"{ranks}.yaml")
        torchrun(["-m", "pipeline", "run", str(tmp_path / f"{ranks}.yaml")], ranks, 300)
        runs.append(recipe.run_path)
    for number in range(3):
        one, two = (stage(run, number) for run in runs)
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items() if name.startswith("router."))
        answers = [(run / "eval" / "after-03" / f"T{number}.jsonl").read_text("utf-8").splitlines() for run in runs]
        selected, scores = ([[json.loads(line)[key] for line in part] for part in answers] for key in SHOWN)
        assert selected[0] == selected[1] and scores[0] == scores[1]


def test_a_resumed_run_learns_the_same_bits(make: MakeRecipe, tmp_path: Path) -> None:
    whole, parts = (with_router(make, RANDOM, share=0.3) for _ in range(2))
    parts = parts.model_copy(update={"run_dir": str(tmp_path / "parts")})
    run_sequence(whole)
    for until in (1, 2, 3):
        run_sequence(parts, until=until)
    for number in range(3):
        one, other = stage(whole.run_path, number), stage(parts.run_path, number)
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_router_may_change_in_the_middle_of_a_run(make: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    begun = with_router(make, "prototype")
    run_sequence(begun, until=2)
    before = stage(begun.run_path, 0)
    changed = with_router(make, "ridge")
    run_sequence(changed)
    after = stage(changed.run_path, 0)
    assert torch.equal(after["prompt"], before["prompt"]) and "router.keys.text" in after and "prototype" not in after
    assert load_run(begun.run_path).method.router == "ridge"  # type: ignore[attr-defined]
    assert "recognises tasks by ridge" in capsys.readouterr().err
    log = changed.run_path / "stages" / "01-T0" / "metrics.jsonl"
    assert json.loads(log.read_text("utf-8").splitlines()[0])
    assert evaluate_run(changed.run_path)["stages"] == 3
    # The third stage was trained without a head, so the learned router does not come back.
    with pytest.raises(UserError, match=r"stage T2 of .* was trained without"):
        run_sequence(with_router(make, "prototype"))
    assert load_run(begun.run_path).method.router == "ridge"  # type: ignore[attr-defined]


def test_a_router_that_was_being_replaced_when_the_run_was_killed_is_replaced_by_the_next_call(
    make: MakeRecipe,
) -> None:
    begun = with_router(make, "prototype")
    run_sequence(begun, stages="train", until=2)
    before, stages = stage(begun.run_path, 0), begun.run_path / "stages"
    # Killed between the two renames of the first stage's folder; the third one was in training.
    (begun.run_path / REPLACING_ROUTING).touch()
    (stages / "01-T0").rename(stages / "01-T0.unfinished")
    (stages / "03-T2.unfinished").mkdir()
    with pytest.raises(UserError, match="is being replaced, or a process was killed"):
        source_of(begun.run_path)
    run_sequence(with_router(make, "ridge"), stages="train", until=2)
    after = stage(begun.run_path, 0)
    assert torch.equal(after["prompt"], before["prompt"]) and "router.keys.text" in after
    assert not (stages / "03-T2.unfinished").exists() and not (begun.run_path / REPLACING_ROUTING).exists()
    assert source_of(begun.run_path).method.router == "ridge"  # type: ignore[attr-defined]


def test_a_learned_router_comes_back_while_its_heads_are_there(make: MakeRecipe) -> None:
    recipe = with_router(make, "prototype", tasks=2)
    run_sequence(recipe)
    before = stage(recipe.run_path, 1)
    run_sequence(with_router(make, "mean", tasks=2))
    assert not torch.equal(stage(recipe.run_path, 1)["prototype"], before["prototype"])
    run_sequence(with_router(make, "prototype", tasks=2))
    after = stage(recipe.run_path, 1)
    assert after.keys() == before.keys()
    torch.testing.assert_close(after["prototype"], before["prototype"], atol=1e-6, rtol=1e-5)  # computed once more
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name != "prototype")


def test_a_run_older_than_the_field_router_keeps_the_learned_one(make: MakeRecipe) -> None:
    recipe = with_router(make, "prototype", tasks=1)
    run_sequence(recipe)
    path = recipe.run_path / CONFIG
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("  router:")) + "\n"
    )
    assert load_run(recipe.run_path).method.router == "prototype"  # type: ignore[attr-defined]
    assert load_recipe(path).method.router == "prototype"  # type: ignore[attr-defined]
    # A recipe that names none goes on with that of the run, whatever the default is by now.
    kind: Any = type(recipe.method)
    unset = {name: value for name, value in recipe.method.model_dump().items() if name != "router"}
    later = recipe.model_copy(update={"method": kind.model_construct(**unset, router="ridge")})
    later.method.model_fields_set.discard("router")
    assert later.continuing({"method": {"name": "modalprompt"}}).method.router == "prototype"  # type: ignore[attr-defined]
    assert later.continuing({"method": {"router": "mean"}}).method.router == "mean"  # type: ignore[attr-defined]
    named = with_router(make, "ridge", tasks=1)
    assert named.continuing({"method": {"router": "mean"}}).method.router == "ridge"  # type: ignore[attr-defined]


def test_too_few_samples_are_told_with_what_the_router_needs(
    make: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_router(make, "ridge", tasks=2)
    tasks = [{**task.model_dump(), "limit_train": 3} for task in recipe.data.tasks]
    few = Recipe.model_validate({**recipe.model_dump(), "data": {**recipe.data.model_dump(), "tasks": tasks}})
    assert run_sequence(few)["stages"] == 2
    assert "the task T0 has 3 training samples, and the router ridge needs 4" in capsys.readouterr().err
