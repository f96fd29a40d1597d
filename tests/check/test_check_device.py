"""`check` says for which devices it plans the memory: those that are here, or GPUs that the user describes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.check.device import GB, Device
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.planning.auto import fits

SEVEN = "llava15_7b_own"


@pytest.fixture(autouse=True)
def without_gpus(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without models and without GPUs, which is no node of a launch."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def checked(*arguments: str) -> dict[str, Any]:
    """The object that `check --json` prints; models that are not here are problems, and planned all the same."""
    done = CliRunner().invoke(app, ["check", *arguments, "--json"])
    assert "Traceback" not in done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"].keys() <= {"model", "keys", "data"}
    return found


def test_a_7b_is_planned_for_a_card_that_is_not_here() -> None:
    found = checked(SEVEN, "--gpu-memory", "24")
    plan = found["memory"]
    words = "1 GPU of 24 GB"
    assert plan["device"] == {"kind": "gpu", "bytes": 24 * GB, "name": None, "here": False, "words": words}
    assert plan["fits"] is True and plan["ranks"] == 1 and plan["zero_stage"] == 2
    assert fits(max(plan["bytes_per_gpu"].values()), 24 * GB)
    shown = CliRunner().invoke(app, ["check", SEVEN, "--gpu-memory", "24"], env={"COLUMNS": "400"}).stdout
    assert f"for {words} (--gpu-memory), not for this machine: fits, " in shown
    assert f"memory plan for {words}, ZeRO stage 2" in shown
    assert "auto: by the memory plan" in found["deepspeed"] and "memory" not in found["warnings"]


def test_a_plan_for_cpus_says_that_it_is_one_and_how_to_plan_for_a_card() -> None:
    found = checked(SEVEN)
    plan = found["memory"]
    assert plan["device"]["kind"] == "cpu" and plan["device"]["here"] and plan["fits"] is None
    assert plan["zero_stage"] == 3
    shown = CliRunner().invoke(app, ["check", SEVEN], env={"COLUMNS": "400"}).stdout
    assert "for 1 rank on CPUs, as torch sees no GPU here (--gpu-memory 24 plans for GPUs of 24 GB)" in shown
    assert "for CUDA" not in shown


def test_what_makes_a_run_fit_into_a_small_card_does() -> None:
    found = checked(SEVEN, "--gpu-memory", "12")
    assert found["memory"]["fits"] is False
    (warning,) = found["warnings"]["memory"]
    assert "9.36 GiB of a GPU's 11.18 GiB may be planned" in warning
    changes = shlex.split(warning.partition("it fits with ")[2])
    assert changes[::2] == ["--set"] * (len(changes) // 2) and "model.quantization=nf4" in changes
    again = checked(SEVEN, "--gpu-memory", "12", *changes)
    assert again["memory"]["fits"] is True and "memory" not in again["warnings"]


def test_a_card_that_nothing_fits_into_is_called_too_small() -> None:
    found = checked(SEVEN, "--gpu-memory", "4")
    assert found["memory"]["fits"] is False
    assert "plan for more GPUs (--ranks) or larger ones" in found["warnings"]["memory"][0]


def test_several_cards_are_planned_for_with_ranks() -> None:
    found = checked("coin_llava15_7b", "--gpu-memory", "16", "--ranks", "16")
    assert found["memory"]["device"]["words"] == "16 GPUs of 16 GB"
    assert found["memory"]["zero_stage"] == 3
    (warning,) = found["warnings"]["memory"]  # training fits: only answers need another setting
    assert "with evaluate.engine=sharded they take" in warning
    again = checked("coin_llava15_7b", "--gpu-memory", "16", "--ranks", "16", "--set", "evaluate.engine=sharded")
    assert again["memory"]["fits"] is True


def test_a_benchmark_is_planned_for_a_card_too() -> None:
    large, small = (checked("base2new_vitb16", "--gpu-memory", size) for size in ("80", "1"))
    assert large["memory"]["fits"] is True and large["memory"]["device"]["words"] == "1 GPU of 80 GB"
    assert small["memory"]["fits"] is False
    assert "lower train.micro_batch, evaluate_batch or model.text_chunk" in small["warnings"]["memory"][0]


def test_memory_below_a_gigabyte_is_refused() -> None:
    done = CliRunner().invoke(app, ["check", SEVEN, "--gpu-memory", "0"])
    assert done.exit_code == 2 and "--gpu-memory" in done.stderr


def test_ranks_are_those_of_the_launch_else_one_per_described_gpu_else_those_that_run_would_start() -> None:
    recipe = load_recipe("nano", ["train.processes=2"])
    asked, here = Device.of(24), Device.of(None)
    assert (asked.ranks(4, recipe, {}), asked.ranks(None, recipe, {}), here.ranks(None, recipe, {})) == (4, 1, 2)
    launched = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert asked.ranks(None, recipe, launched) == here.ranks(None, recipe, launched) == 8
    assert (asked.node({}), asked.node(launched), here.node(launched)) == (8, 4, None)
