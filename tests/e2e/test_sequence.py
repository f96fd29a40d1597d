"""Whole sequences on a tiny model: what a run leaves, what it never changes, how it goes on after a stop."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.adapter import export
from pipeline.adapter.predict import predict
from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.lmm import LMM
from pipeline.config.load import load_run
from pipeline.errors import Interrupted, UserError
from pipeline.hub import snapshots
from pipeline.hub.snapshots import Source
from pipeline.hub.weights import file_fingerprints
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import StageCheckpoint
from pipeline.sequence.run import evaluate_run, run_sequence
from pipeline.sequence.stage import StageTrainer, TrainedStage
from pipeline.training.engine import Engine
from pipeline.training.loop import DivergedError
from tests.e2e.conftest import MakeRecipe
from tests.stopping import signal_in_forward

pytestmark = pytest.mark.e2e


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_the_files_of_the_contract(make: MakeRecipe) -> None:
    recipe = make()
    result = run_sequence(recipe)
    run = recipe.run_path
    assert read(run / "run.json")["status"] == "done"
    assert {path.name for path in (run / "stages").iterdir()} == {"01-T0", "02-T1", "03-T2"}
    for stage in (run / "stages").iterdir():
        assert {"prompts.safetensors", "meta.json", "metrics.jsonl", "COMPLETE"} <= {p.name for p in stage.iterdir()}
    assert [len([s for s in row if s is not None]) for row in result["accuracy"]] == [1, 2, 3]
    assert len(result["zero_shot"]) == 3
    assert set(result["routing"]) == {"accuracy", "image_only", "text_only", "confusion", "confused"}
    assert result["told"][:2] == [None, None] and len(result["told"][2]) == 3
    assert read(run / "matrix.json")["accuracy"] == result["accuracy"]
    predictions = lines(run / "eval" / "after-03" / "T0.jsonl")
    assert [line["id"] for line in predictions] == ["0", "1", "2", "3"]
    assert all(len(line["selected"]) == 3 and len(line["similarity"]) == 3 for line in predictions)
    assert all(line["selected"] == [] for line in lines(run / "eval" / "zero-shot" / "T0.jsonl"))


def test_twelve_tasks_work_and_the_last_one_learns(make: MakeRecipe) -> None:
    recipe = make(tasks=12, train__steps=8, train__global_batch=6, train__lr_prompt=0.2, evaluate__zero_shot=False)
    run_sequence(recipe, stages="train")
    for number in (0, 11):
        history = lines(recipe.run_path / "stages" / f"{number + 1:02d}-T{number}" / "metrics.jsonl")
        assert history[-1]["loss_lm"] < history[0]["loss_lm"] - 0.2, f"stage {number + 1} did not learn"


def check_frozen(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage changes a weight of the base model, an earlier set or an earlier prototype by one bit."""
    train = StageTrainer.train
    seen: list[int] = []
    saved: list[StageCheckpoint] = []  # of the stages so far

    def check_pool(pool: PromptPool) -> None:
        assert len(pool) == len(saved)
        for number, earlier in enumerate(saved):
            assert torch.equal(pool.prompts[number], earlier.tensors["prompt"])
            assert torch.equal(pool.prototypes[number], earlier.tensors["prototype"])

    def watched(self: StageTrainer, index: int, stage: Any, pool: PromptPool, *given: Any) -> TrainedStage:
        base = {name: weight.clone() for name, weight in self.engine().module.lmm.state_dict().items()}
        check_pool(pool)
        trained = train(self, index, stage, pool, *given)
        for name, weight in self.engine().module.lmm.state_dict().items():
            assert torch.equal(weight, base[name]), f"{name} of the base model changed"
        check_pool(pool)
        saved.append(trained.checkpoint)
        seen.append(index)
        return trained

    monkeypatch.setattr(StageTrainer, "train", watched)
    run_sequence(recipe, stages="train")
    assert seen == [0, 1, 2]


def test_base_model_and_earlier_sets_stay_bit_identical(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    check_frozen(make(train__weight_decay=0.1), monkeypatch)


def test_a_method_that_trains_the_backbone_is_noticed(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def with_backbone(self: Engine) -> None:
        with torch.no_grad():
            for parameter in self.module.lmm.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-3 * parameter.grad)
        step(self)

    monkeypatch.setattr(LMM, "freeze", lambda self: self.eval())
    monkeypatch.setattr(Engine, "step", with_backbone)
    with pytest.raises(AssertionError, match="base model changed"):
        check_frozen(make(), monkeypatch)


def test_a_restart_trains_only_what_is_missing_and_gives_the_same_matrix(make: MakeRecipe) -> None:
    recipe = make()
    whole = run_sequence(recipe)
    run = recipe.run_path
    first = (run / "stages" / "01-T0" / "prompts.safetensors").stat().st_mtime_ns
    last = load_file(run / "stages" / "03-T2" / "prompts.safetensors")
    shutil.rmtree(run / "stages" / "03-T2")
    again = run_sequence(recipe)
    assert (run / "stages" / "01-T0" / "prompts.safetensors").stat().st_mtime_ns == first
    redone = load_file(run / "stages" / "03-T2" / "prompts.safetensors")
    assert all(torch.equal(redone[name], last[name]) for name in last)
    assert again["accuracy"] == whole["accuracy"]


def test_a_half_written_stage_is_trained_again(make: MakeRecipe) -> None:
    recipe = make(tasks=1)
    run_sequence(recipe, stages="train")
    stage = recipe.run_path / "stages" / "01-T0"
    (stage / "COMPLETE").unlink()
    run_sequence(recipe, stages="train")
    assert (stage / "COMPLETE").is_file()


def test_a_damaged_stage_is_refused(make: MakeRecipe) -> None:
    recipe = make(tasks=1)
    run_sequence(recipe, stages="train")
    path = recipe.run_path / "stages" / "01-T0" / "prompts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.safetensors.*sha256.*Remove the folder"):
        run_sequence(recipe)


def test_a_run_folder_of_another_recipe_lists_the_fields_that_differ(make: MakeRecipe) -> None:
    run_sequence(make(tasks=1), stages="train")
    with pytest.raises(UserError, match=r"belongs to another recipe.*method\.k: 3 there, 2 now"):
        run_sequence(make(tasks=1, method__k=2))


def test_a_run_may_go_on_with_another_micro_batch_and_zero_stage(make: MakeRecipe) -> None:
    run_sequence(make(tasks=1), stages="train")
    run_sequence(make(tasks=1, train__micro_batch=2, train__deepspeed="ds_configs/zero2.json"), stages="train")


def test_a_loss_that_is_not_finite_stops_with_the_samples_of_the_step(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LearnerOnLMM.forward, []

    def poisoned(self: LearnerOnLMM, batch: Any, normaliser: Any) -> Any:
        loss, terms = forward(self, batch, normaliser)
        calls.append(batch.ids)
        poison = float("nan") if len(calls) == 4 else 1.0
        return loss * poison, {name: term * poison for name, term in terms.items()}

    monkeypatch.setattr(LearnerOnLMM, "forward", poisoned)
    recipe = make()
    with pytest.raises(DivergedError, match="step 2 is not a finite number") as caught:
        run_sequence(recipe, stages="train")
    assert all(identity in str(caught.value) for identity in calls[3])
    stages = recipe.run_path / "stages"
    assert (stages / "01-T0" / "COMPLETE").is_file()
    kept = load_file(stages / "02-T1.unfinished" / "last_good.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert read(recipe.run_path / "run.json")["status"] == "failed"


def test_a_signal_stops_at_a_step_boundary_and_keeps_finished_stages(make: MakeRecipe) -> None:
    recipe = make()
    with signal_in_forward(LearnerOnLMM, 3, signal.SIGTERM), pytest.raises(Interrupted, match="after step 1 of 2"):
        run_sequence(recipe, stages="train")
    assert read(recipe.run_path / "run.json")["status"] == "stopped"
    assert (recipe.run_path / "stages" / "01-T0" / "COMPLETE").is_file()
    run_sequence(recipe, stages="train")
    assert read(recipe.run_path / "run.json")["stage"] == 3


def test_evaluation_can_follow_training_and_gives_the_same_matrix(make: MakeRecipe) -> None:
    recipe = make()
    run_sequence(recipe, stages="train")
    later = evaluate_run(recipe.run_path)
    assert later["accuracy"] == run_sequence(make(seed=0, run_dir=str(recipe.run_path) + "-x"))["accuracy"]


def test_answers_are_generated_once_for_the_same_sets(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[int] = []
    join = GreedyDecoder.join

    def counted(self: GreedyDecoder[Row], prompts: Prompts, rows: list[Row]) -> list[Row]:
        generated.append(len(rows))
        return join(self, prompts, rows)

    monkeypatch.setattr(GreedyDecoder, "join", counted)
    run_sequence(make(method__name="independent", evaluate__zero_shot=False))
    assert sum(generated) == 3 * 4  # the matrix has six entries, but each task only one prompt set


@pytest.mark.parametrize("method", ["sequential", "joint", "zero_shot"])
def test_the_other_methods_run_through(make: MakeRecipe, method: str) -> None:
    result = run_sequence(make(method__name=method))
    known = [sum(score is not None for score in row) for row in result["accuracy"]]
    assert known == {"sequential": [1, 2, 3], "joint": [0, 0, 3], "zero_shot": []}[method]


def test_sequential_goes_on_with_the_prompt_of_the_stage_before(make: MakeRecipe) -> None:
    recipe = make(method__name="sequential", train__lr_prompt=1e-9)
    run_sequence(recipe, stages="train")
    prompts = [load_file(recipe.run_path / "stages" / f"0{n + 1}-T{n}" / "prompts.safetensors") for n in range(2)]
    torch.testing.assert_close(prompts[0]["prompt"], prompts[1]["prompt"], atol=1e-6, rtol=0)


def test_a_run_whose_weights_were_fetched_by_its_first_start_goes_on(
    make: MakeRecipe, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a model of the Hub: configuration and tokenizer are here, the weights come when they are asked for.
    folder = Path(shutil.copytree(prepared / "llava", tmp_path / "llava"))
    hidden = (folder / "model.safetensors").rename(tmp_path / "later")

    def fetched(source: Source, weights: bool) -> Path:
        if weights and hidden.exists():
            hidden.rename(folder / "model.safetensors")
        return folder if source.field == "model.path" else prepared / "clip"

    monkeypatch.setattr(snapshots, "_fetched", fetched)
    monkeypatch.setattr(snapshots, "_known", {})
    monkeypatch.setattr(snapshots, "_settings", {})
    recipe = make(tasks=2, model__path="owner/model", evaluate__zero_shot=False)
    run_sequence(recipe, until=1)
    monkeypatch.setattr(snapshots, "_known", {})
    assert run_sequence(recipe)["stages"] == 2


def test_a_run_of_an_earlier_version_goes_on_with_the_fingerprint_that_it_recorded(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tasks=2)
    earlier = file_fingerprints(Path(recipe.model.path))[0]
    with monkeypatch.context() as before:
        before.setattr("pipeline.sequence.opened.base_fingerprint", lambda *_: earlier)
        run_sequence(recipe, until=1)
    answered = (recipe.run_path / "eval" / "after-01" / "T0.jsonl").read_text()
    monkeypatch.setattr(GreedyDecoder, "join", None)  # the answers that are there are kept
    with pytest.raises(TypeError):
        run_sequence(recipe)
    assert (recipe.run_path / "eval" / "after-01" / "T0.jsonl").read_text() == answered
    metas = [read(path)["base_model"] for path in sorted(recipe.run_path.glob("stages/*/meta.json"))]
    assert metas == [earlier, earlier]


def penalties_used(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The penalty on repeated tokens of every generation from now on."""
    used: list[float] = []
    join = GreedyDecoder.join

    def watched(self: GreedyDecoder[Row], prompts: Prompts, rows: list[Row]) -> list[Row]:
        used.append(self.lmm.model.generation_config.repetition_penalty)
        return join(self, prompts, rows)

    monkeypatch.setattr(GreedyDecoder, "join", watched)
    return used


def test_predict_and_an_exported_adapter_have_the_penalty_of_the_run(
    make: MakeRecipe, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(prepared / "llava", tmp_path / "llava"))
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    recipe = make(tasks=1, model__path=str(folder))
    run_sequence(recipe, stages="train")
    used = penalties_used(monkeypatch)
    config = recipe.run_path / "config.yaml"
    fields = yaml.safe_load(config.read_text())
    for said, expected in ((1.0, 1.0), (1.7, 1.7), ("checkpoint", 1.3)):
        fields["evaluate"]["repetition_penalty"] = said
        config.write_text(yaml.safe_dump(fields))
        export(str(recipe.run_path), f"{tmp_path}/adapter-{said}")  # texts, as a program gives them
        for place in (recipe.run_path, tmp_path / f"adapter-{said}"):
            used.clear()
            predict(place, None, "what is this?")
            assert used == [expected], f"{said} in {place.name}"


def test_a_run_from_before_there_was_a_choice_keeps_the_checkpoints_penalty(
    make: MakeRecipe, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(prepared / "llava", tmp_path / "llava"))
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    used = penalties_used(monkeypatch)
    recipe = make(tasks=1, model__path=str(folder))
    run_sequence(recipe)
    assert set(used) == {1.0}, "a new run has none"
    config = recipe.run_path / "config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "repetition_penalty" not in line))
    used.clear()
    assert load_run(recipe.run_path).evaluate.repetition_penalty == "checkpoint"
    run_sequence(recipe)
    assert set(used) == {1.3}, "answers without it are not taken for answers with it"
