"""A stage that was stopped goes on exactly: same numbers, any number of ranks, damaged checkpoints passed over."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.recipe import Recipe
from pipeline.console.progress import SPEEDS
from pipeline.errors import Interrupted, UserError
from pipeline.files.atomic import sha256
from pipeline.prompts.model import LearnerOnLMM
from pipeline.runs import lock as run_lock
from pipeline.runs.claim import claim_run
from pipeline.sequence.run import run_sequence
from pipeline.training.loop import DivergedError
from pipeline.training.resume import DamagedError, StepState, newest, read_step, write_step
from tests.e2e.conftest import recipe_on
from tests.processes import torchrun
from tests.runs.test_run_lock import holder
from tests.stopping import signal_in_forward

STEPS, LIMIT_S = 6, 300
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make(prepared: Path, tmp_path: Path) -> MakeRecipe:
    def recipe(folder: str = "run", **changes: Any) -> Recipe:
        fields = {"train__steps": STEPS, "train__save_minutes": None, "train__lr_prompt": 1e-2, **changes}
        return recipe_on(prepared, tmp_path / folder, 2, **fields)

    return recipe


def stage(recipe: Recipe, number: int = 2, unfinished: bool = False) -> Path:
    return recipe.run_path / "stages" / f"{number:02d}-T{number - 1}{'.unfinished' if unfinished else ''}"


def learned(recipe: Recipe) -> list[str]:
    return [sha256(stage(recipe, number) / "prompts.safetensors") for number in (1, 2)]


def losses(recipe: Recipe, number: int = 2) -> list[dict[str, float]]:
    """The log of a stage without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (stage(recipe, number) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]


def stopped(recipe: Recipe, step: int = 3, **how: Any) -> Recipe:
    """Stop a run by a signal after that step of its second stage."""
    with (
        signal_in_forward(LearnerOnLMM, STEPS + step, **how),
        pytest.raises(Interrupted, match=f"after step {step} of {STEPS}.*resume from step-0000000{step}"),
    ):
        run_sequence(recipe, stages="train")
    return recipe


@pytest.mark.parametrize(
    ("zero", "dtype", "accumulate"),
    [
        (0, "float32", None),
        (3, "bfloat16", 2),
        pytest.param(0, "bfloat16", None, marks=pytest.mark.slow),
        pytest.param(2, "float32", 2, marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", None, marks=pytest.mark.slow),
        pytest.param(3, "float32", None, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_stage_goes_on_bit_for_bit(make: MakeRecipe, zero: int, dtype: str, accumulate: int | None) -> None:
    changes: dict[str, Any] = {"train__deepspeed": f"ds_configs/zero{zero}.json", "train__micro_batch": accumulate}
    changes |= {"model__dtype": dtype, "train__schedule": "cosine", "train__weight_decay": 0.1}
    whole = make("whole", **changes)
    run_sequence(whole, stages="train")
    calls = 1 if accumulate is None else 2
    recipe = make("stopped", **changes)
    with (
        signal_in_forward(LearnerOnLMM, (STEPS + 3) * calls),
        pytest.raises(Interrupted, match="after step 3 of 6"),
    ):
        run_sequence(recipe, stages="train")
    run_sequence(recipe, stages="train")
    assert learned(recipe) == learned(whole)
    assert losses(recipe) == losses(whole)


def test_a_trained_projector_goes_on_too(make: MakeRecipe) -> None:
    changes = {"train__projector": "trained", "train__lr_projector": 1e-3}
    whole = make("whole", **changes)
    run_sequence(whole, stages="train")
    recipe = stopped(make("stopped", **changes))
    run_sequence(recipe, stages="train")
    assert learned(recipe) == learned(whole)


def test_random_numbers_go_on_where_they_were(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LearnerOnLMM.forward

    def noisy(self: LearnerOnLMM, *arguments: Any) -> Any:
        loss, terms = forward(self, *arguments)
        return loss * (1 + torch.rand(())), terms

    monkeypatch.setattr(LearnerOnLMM, "forward", noisy)
    torch.manual_seed(0)
    whole = make("whole")
    run_sequence(whole, stages="train")
    torch.manual_seed(0)
    recipe = stopped(make("stopped"))
    torch.manual_seed(123)
    run_sequence(recipe, stages="train")
    assert learned(recipe) == learned(whole)


def test_a_second_signal_does_not_harm_the_saving(make: MakeRecipe) -> None:
    recipe = stopped(make(), number=signal.SIGTERM, signals=5)
    assert newest(stage(recipe, unfinished=True)).step == 3  # type: ignore[union-attr]


def test_a_signal_in_the_last_step_keeps_the_finished_stage(make: MakeRecipe) -> None:
    recipe = make()
    with signal_in_forward(LearnerOnLMM, STEPS), pytest.raises(Interrupted, match="between two stages"):
        run_sequence(recipe, stages="train")
    assert (stage(recipe, 1) / "COMPLETE").is_file()
    assert not stage(recipe, 2, unfinished=True).exists()


def test_checkpoints_are_written_when_due_and_only_the_newest_kept(make: MakeRecipe) -> None:
    recipe = stopped(make(train__save_steps=1, train__keep=2), step=4)
    kept = stage(recipe, unfinished=True) / "resume"
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000003", "step-00000004"]
    run_sequence(recipe, stages="train")
    assert not (stage(recipe) / "resume").exists()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        del content[len(content) // 2 :]
    path.write_bytes(content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_told_from_a_whole_one(
    make: MakeRecipe, tmp_path: Path, saved: Path, file: str, how: str
) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    assert read_step(copy / "step-00000003").step == 3
    damage(copy / "step-00000003" / file, how)
    with pytest.raises(DamagedError):
        read_step(copy / "step-00000003")


@pytest.fixture(scope="module")
def saved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints after steps 2 and 3 of a second stage."""
    recipe = recipe_on(prepared, tmp_path_factory.mktemp("saved"), 2, train__steps=STEPS, train__save_steps=1)
    stopped(recipe)
    return stage(recipe, unfinished=True) / "resume"


def test_a_damaged_checkpoint_is_passed_over_with_a_message_and_the_one_before_used(
    make: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make("whole")
    run_sequence(whole, stages="train")
    recipe = stopped(make("stopped", train__save_steps=1))
    damage(stage(recipe, unfinished=True) / "resume" / "step-00000003" / "state.safetensors", "flipped")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        run_sequence(recipe, stages="train")
    assert "step-00000003 is skipped" in caplog.text
    assert "resuming after step 2" in caplog.text
    assert learned(recipe) == learned(whole)
    assert losses(recipe) == losses(whole)


def test_a_checkpoint_gives_back_all_that_it_was_given(tmp_path: Path) -> None:
    one, two, three, four = (torch.full((2,), float(number)) for number in range(1, 5))
    random = [{"cpu": torch.arange(3, dtype=torch.uint8)}]
    moments = {"exp_avg": {"a.b": two}, "exp_avg_sq": {"a.b": three}}
    state = StepState(7, {"a.b": one}, moments, random, {"task": "T"}, {"a.b": four})
    found = read_step(write_step(tmp_path, state, keep=1))
    assert sorted(float(value[0]) for value in found.shared.values()) == [1, 2, 3, 4]  # what ranks are compared in
    assert found.values["a.b"].equal(one) and found.rest["a.b"].equal(four)
    assert found.moments.keys() == moments.keys()
    assert all(found.moments[kind]["a.b"].equal(part["a.b"]) for kind, part in moments.items())
    assert found.random[0]["cpu"].equal(random[0]["cpu"])
    assert found.meta["task"] == "T"


def test_a_stage_whose_predecessors_changed_begins_anew(make: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    whole = make("whole", seed=1)
    run_sequence(whole, stages="train")
    recipe = stopped(make("stopped"))
    shutil.rmtree(stage(recipe, 1))
    shutil.copytree(stage(whole, 1), stage(recipe, 1))
    with caplog.at_level(logging.INFO, logger="pipeline"):
        run_sequence(recipe, stages="train")
    assert "it begins anew" in caplog.text
    assert [line["step"] for line in losses(recipe)] == list(range(1, STEPS + 1))


def test_a_run_that_another_process_writes_to_is_left_alone(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make()
    run = claim_run(recipe)
    monkeypatch.setattr(run_lock, "WAIT_S", 0.1)
    with holder(run) as (process, _), pytest.raises(UserError, match=f"in use by process {process.pid}"):
        run_sequence(recipe, stages="train")
    assert not (run / "stages").exists()


def test_a_loss_that_is_no_number_is_named_on_a_full_disk_too(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    forward = LearnerOnLMM.forward

    def poisoned(*given: Any) -> Any:
        loss, terms = forward(*given)
        return loss * float("nan"), {name: term * float("nan") for name, term in terms.items()}

    monkeypatch.setattr("pipeline.training.loop.save_file", full)
    monkeypatch.setattr(LearnerOnLMM, "forward", poisoned)
    with pytest.raises(DivergedError, match=r"loss of step 1 is not a finite number.*could not be kept.*No space left"):
        run_sequence(make(), stages="train")


def test_a_disk_that_is_full_costs_a_warning_and_not_the_training(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pipeline.training.resume.write_synced", full)
    recipe = make(train__save_steps=1)
    run_sequence(recipe, stages="train")
    assert "could not be saved" in caplog.text
    assert (stage(recipe) / "COMPLETE").is_file()


def assert_near(found: dict[str, list[float]], wanted: dict[str, list[float]], name: str) -> None:
    """To 1e-6 of each number, or of one for those below one: a loss of 8 has steps of 9.5e-7 in float32."""
    for key, numbers in wanted.items():
        worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found[key], numbers, strict=True))
        assert worst <= 1e-6, f"{name}: {key} differs by {worst}"


@pytest.mark.gloo
def test_what_one_or_two_ranks_saved_goes_on_on_one_and_on_two(prepared: Path, tmp_path: Path) -> None:
    """Float32, to 1e-6 of the run that was never stopped; bit for bit on as many ranks as before."""
    for ranks in (2, 1, 2):  # the last time for what one rank left
        torchrun(["-m", "tests.training.elastic", str(prepared), str(tmp_path)], ranks, LIMIT_S)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(results) == {"2-whole", "2-to-2", "1-whole", "2-to-1", "1-to-1", "1-to-2"}
    assert results["2-to-2"] == results["2-whole"]
    assert results["1-to-1"] == results["1-whole"]
    for name in ("2-to-1", "1-to-2", "1-whole"):
        assert_near(results[name], results["2-whole"], name)


@pytest.mark.gloo
@pytest.mark.slow
def test_what_four_ranks_saved_goes_on_on_three(prepared: Path, tmp_path: Path) -> None:
    """A job that comes back smaller by one node: float32, to 1e-6 of the run that was never stopped."""
    for ranks in (4, 3):
        torchrun(["-m", "tests.training.elastic", str(prepared), str(tmp_path), "12"], ranks, 2 * LIMIT_S)
    whole, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("4-whole", "4-to-3"))
    assert_near(resumed, whole, "4-to-3")
