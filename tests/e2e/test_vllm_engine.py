"""`evaluate.engine: vllm`: a run's answers come from a server that gets the prompt sets with each question.

The server is a small one that does what vLLM does; tests/vllm has the real one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.prepare import prepare
from pipeline.adapter.vocabulary.export import export_checkpoint
from pipeline.check.sequence import check
from pipeline.cli.commands import app
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_USER, UserError
from pipeline.sequence import models, vllm_server
from pipeline.sequence.opened import require_fitting
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import MakeRecipe, prepare_project, recipe_on
from tests.e2e.test_divided import predictions
from tests.serve.front.fake_engine import FakeEngine

TASKS = 2
EVALUATE = {"told": "stages", "ahead": True, "held_out": True, "batch": 2}


@pytest.fixture(scope="module")
def checkpoint(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server needs before anything is trained."""
    folder = tmp_path_factory.mktemp("engine")
    recipe_on(prepared, folder, TASKS).dump_yaml(folder / "mine.yaml")
    export_checkpoint(folder / "mine.yaml", folder / "parts", "parts")
    return folder / "parts"


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(checkpoint).up()
    yield fake
    fake.down()


def recipe_at(url: str, prepared: Path, folder: Path, **changes: Any) -> Recipe:
    return recipe_on(
        prepared, folder, TASKS, **{"evaluate": {**EVALUATE, "engine": "vllm", "vllm_url": url}, **changes}
    )


def replicas_of(run: Recipe, prepared: Path, folder: Path, **changes: Any) -> dict[str, str]:
    """The predictions of a finished run's stages by a replica."""
    one = recipe_on(prepared, folder, TASKS, evaluate=EVALUATE, **changes)
    shutil.copytree(run.run_path, one.run_path)
    for place in predictions(one.run_path):
        (one.run_path / place).unlink()
    run_sequence(one, stages="evaluate")
    return predictions(one.run_path)


def test_every_evaluation_of_a_run_is_that_of_a_replica_and_is_reused(
    prepared: Path, engine: FakeEngine, tmp_path: Path
) -> None:
    recipe = recipe_at(f"{engine.url}/v1/", prepared, tmp_path / "served")
    run_sequence(recipe)
    found, asked = predictions(recipe.run_path), len(engine.questions())
    assert len(found) > 2 * TASKS and asked > 2 * TASKS
    assert found == replicas_of(recipe, prepared, tmp_path / "one")
    run_sequence(recipe)  # nothing is left to answer
    assert len(engine.questions()) == asked and predictions(recipe.run_path) == found


def test_the_ranks_load_no_model_to_evaluate_with(
    prepared: Path, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_at(engine.url, prepared, tmp_path)
    run_sequence(recipe, stages="train")

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(models, "load_lmm", load)
    run_sequence(recipe, stages="evaluate")
    assert predictions(recipe.run_path) and engine.questions()


def test_sets_with_weights_are_sent_multiplied(prepared: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint of another method of the same insertion takes them."""
    fake, soft = FakeEngine(checkpoint).up(), {"method__selection": "soft", "method__gate": None}
    try:
        recipe = recipe_at(fake.url, prepared, tmp_path / "served", **soft)
        run_sequence(recipe)
        assert predictions(recipe.run_path) == replicas_of(recipe, prepared, tmp_path / "one", **soft)
    finally:
        fake.down()


def test_a_server_that_is_lost_leaves_the_answers_so_far_and_the_same_command_goes_on(
    prepared: Path, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "PATIENCE_S", 0.2)
    monkeypatch.setattr(vllm_server, "RETRY_S", 0.05)
    recipe, answer = recipe_at(engine.url, prepared, tmp_path / "served"), engine.answer
    run_sequence(recipe, stages="train")

    def dying(body: dict[str, Any]) -> list[int]:
        if len(engine.questions()) > 5:
            engine.down()
        return answer(body)

    monkeypatch.setattr(engine, "answer", dying)
    with pytest.raises(UserError, match=r"is not reachable .*expected the server of evaluate.vllm_url to run. The ans"):
        run_sequence(recipe, stages="evaluate")
    monkeypatch.setattr(engine, "answer", answer)
    engine.up()
    run_sequence(recipe, stages="evaluate")
    assert predictions(recipe.run_path) == replicas_of(recipe, prepared, tmp_path / "one")


def test_a_question_that_a_server_would_not_read_as_text_is_named(tmp_path: Path) -> None:
    """A replica reads special tokens in a question as text."""
    prepare_project(tmp_path, TASKS)
    file = tmp_path / "coin" / "instructions" / "T1" / "test.json"
    entries = json.loads(file.read_text("utf-8"))
    entries[2]["text"] += " </s>"
    file.write_text(json.dumps(entries), "utf-8")
    changes = {"data__prepared": str(tmp_path / "again")}
    prepare(recipe_on(tmp_path, tmp_path, TASKS, **changes), progress=False)
    recipe_on(tmp_path, tmp_path, TASKS, **changes).dump_yaml(tmp_path / "mine.yaml")
    export_checkpoint(tmp_path / "mine.yaml", tmp_path / "parts", "parts")
    fake = FakeEngine(tmp_path / "parts").up()
    try:
        recipe = recipe_at(fake.url, tmp_path, tmp_path / "served", **changes)
        with pytest.raises(UserError, match=r"^Question .* of T1 has a special token of the model in its text"):
            run_sequence(recipe)
        assert fake.questions() and not any("</s>" in json.dumps(body) for body in fake.asked)
        evaluate = recipe.evaluate.model_copy(update={"engine": "replicas", "vllm_url": None})
        run_sequence(recipe.model_copy(update={"evaluate": evaluate}))
    finally:
        fake.down()


def test_a_server_with_another_checkpoint_is_refused(prepared: Path, engine: FakeEngine, tmp_path: Path) -> None:
    recipe = recipe_at(engine.url, prepared, tmp_path, method__insertion="before_image")
    with pytest.raises(UserError, match="has other prompt sets"):
        run_sequence(recipe)
    engine.processor.chat_template = "{{ messages[0].content[-1].text }}"
    with pytest.raises(UserError, match="serves a model without prompt sets"):
        run_sequence(recipe_at(engine.url, prepared, tmp_path / "plain"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluate": {"engine": "vllm"}}, "evaluate.vllm_url is not set; expected the address of a vLLM server"),
        ({"evaluate": {"engine": "vllm", "vllm_url": "here:1"}}, "evaluate.vllm_url is 'here:1'; expected the address"),
        ({"evaluate": {"vllm_url": "http://h:1"}}, "evaluate.vllm_url means nothing with evaluate.engine replicas"),
        ({"method": {"name": "task_lora"}}, "the method task_lora learns modules of the part"),
        ({"method": {"name": "l2p", "pool_size": 4, "pool_length": 2, "chosen": 2}}, "the method l2p learns modules"),
        (
            {"method": {"name": "modular", "prompt_length": 2, "k": 2, "gate": None}},
            "the method modular learns modules",
        ),
        ({"train__projector": "trained"}, "has the frozen projector; expected train.projector frozen"),
        ({"data__too_long": "truncate"}, "cuts no questions; expected data.too_long refuse or skip"),
    ],
)
def test_what_a_server_cannot_answer_is_one_sentence(make: MakeRecipe, changes: dict[str, Any], sentence: str) -> None:
    fields = {"evaluate": {"engine": "vllm", "vllm_url": "http://127.0.0.1:1"}, **changes}
    with pytest.raises(UserError, match=re.escape(sentence)):
        require_fitting(make(**fields))


def test_a_repetition_penalty_is_refused(make: MakeRecipe) -> None:
    evaluate = {"engine": "vllm", "vllm_url": "http://127.0.0.1:1", "repetition_penalty": 1.2}
    with pytest.raises(UserError, match=r"expected evaluate.repetition_penalty 1, or"):
        require_fitting(make(evaluate=evaluate))


def test_check_says_what_answers_and_whether_it_does(prepared: Path, engine: FakeEngine, tmp_path: Path) -> None:
    found = check(recipe_at(engine.url, prepared, tmp_path), "mine.yaml", 1)
    assert found.problems == {} and "evaluation" not in found.warnings
    assert found.memory is not None and found.memory.evaluation < found.memory.training
    assert next(e for e in found.memory.entries if e.name == "evaluation replica").evaluation == 0
    engine.down()
    found = check(recipe_at(engine.url, prepared, tmp_path), "mine.yaml", 1)
    assert "is not reachable" in found.warnings["evaluation"][0]


def test_a_checkpoint_of_a_recipe_is_for_parts_alone(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(checkpoint.with_name("mine.yaml")), str(tmp_path / "x")])
    assert done.exit_code == EXIT_USER and "expected the folder of a run" in " ".join(done.stderr.split())
