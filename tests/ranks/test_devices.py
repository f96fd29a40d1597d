"""Devices as the user or Slurm gave them, on a machine that is made to look as if it had GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from pipeline.cli import on_ranks as cli
from pipeline.config.load import load_recipe
from pipeline.errors import UserError
from pipeline.ranks import devices, launch
from pipeline.ranks import world as distributed
from pipeline.ranks.devices import GIVEN, choose_device, given_devices, require_usable_gpus, restore_devices
from pipeline.ranks.world import init_world
from tests.processes import PROJECT

UUIDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1c2d3e4f-0000-4106-c12f-20bd9faed9f6"
NAMES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
SHOW = f"""
import json, os, sys
from pathlib import Path
names = {(*NAMES, GIVEN, "LOCAL_RANK")!r}
Path("rank-" + os.environ["RANK"]).write_text(json.dumps([sys.argv[1:], {{n: os.environ.get(n) for n in names}}]))
"""


def seen_by_ranks(tmp_path: Path) -> list[Any]:
    """What two ranks, started by the real launcher, find in their arguments and environment."""
    (tmp_path / "show.py").write_text(SHOW)
    env = launch.launcher_environment(2, str(tmp_path)) | {"PYTHONPATH": str(PROJECT)}
    command = launch.launcher_command(["show", "--x", "1"], 2)
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=120, capture_output=True, text=True)
    assert (done.returncode, "ignoring" in done.stdout) == (0, False)
    return [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "value",
    [
        "4,5",
        *(pytest.param(value, marks=pytest.mark.slow) for value in (UUIDS, "MIG-3f1a5c55-1111-5f6e-9d1c-6b1f1d2e3f4a")),
        "",
    ],
)
def test_ranks_see_the_devices_that_their_launch_was_given(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    for rank, (arguments, found) in enumerate(seen_by_ranks(tmp_path)):
        assert arguments == ["--x", "1"]
        assert found == {
            "CUDA_VISIBLE_DEVICES": value,
            "NVIDIA_VISIBLE_DEVICES": "all",
            "ASCEND_RT_VISIBLE_DEVICES": None,
            "HIP_VISIBLE_DEVICES": None,
            GIVEN: None,
            "LOCAL_RANK": str(rank),
        }


def test_what_was_not_given_is_not_invented() -> None:
    """HIP_VISIBLE_DEVICES reaches the ranks by itself; a CUDA_VISIBLE_DEVICES beside it would contradict it."""
    numbered = {GIVEN: given_devices({"HIP_VISIBLE_DEVICES": "4,5"}), "CUDA_VISIBLE_DEVICES": "0,1"}
    restore_devices(numbered)
    assert numbered == {}


def test_what_another_launcher_set_stays() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    restore_devices(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1"}


# ---------------------------------------------------------------------- one GPU per task, or fewer than there are


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Joins a process group of GPUs that are not there; returns (world, LOCAL_RANK for DeepSpeed)."""

    def joined(visible: int, **place: str) -> tuple[distributed.World, str]:
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
        return init_world(), os.environ["LOCAL_RANK"]

    return joined


@pytest.mark.parametrize(
    ("visible", "local", "device"),
    [(1, 3, 0), (8, 3, 3), (2, 1, 1), (2, 5, 1)],
    ids=["one per task", "all visible", "two visible of eight", "two per task"],
)
def test_deepspeed_is_told_the_number_of_the_device(join: Any, visible: int, local: int, device: int) -> None:
    world, told = join(visible, SLURM_PROCID="11", SLURM_NTASKS="16", SLURM_LOCALID=str(local))
    assert (world.rank, world.device, told) == (11, torch.device("cuda", device), str(device))
    assert join(visible)[0].device == world.device  # asked again, when LOCAL_RANK is DeepSpeed's already


def test_the_first_line_names_the_gpus(join: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pipeline"):
        join(8, RANK="0", WORLD_SIZE="16", LOCAL_RANK="0")
    assert caplog.messages[0].startswith("16 ranks, 8 GPUs visible here: NVIDIA H100 80GB HBM3 (torch ")


# ---------------------------------------------------------------------- GPUs that torch cannot use


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPUs; returns a folder for its /dev/nvidia0 and its driver's version."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "FIRST_GPU", tmp_path / "nvidia0")
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", *devices.BOOKED):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def built(monkeypatch: pytest.MonkeyPatch, build: str, cuda: str | None) -> None:
    monkeypatch.setattr(torch, "__version__", build)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)


ASKED = [
    ("SLURM_GPUS_ON_NODE", "8"),
    ("SLURM_JOB_GPUS", "0,1"),
    ("SLURM_GPUS_PER_TASK", "a100:1"),
    ("CUDA_VISIBLE_DEVICES", "4,5"),
    ("CUDA_VISIBLE_DEVICES", UUIDS),
]


@pytest.mark.parametrize(("name", "value"), ASKED)
@pytest.mark.usefixtures("machine")
def test_gpus_that_were_asked_for_and_cannot_be_used_end_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(monkeypatch, "2.13.0+cpu", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        init_world()
    assert str(refused.value) == (
        f"There are GPUs ({name}={value}) and torch 2.13.0+cpu cannot use them: it is built without CUDA. Install a "
        "build with CUDA (`make venv TORCH=cuda`, or `pip install --force-reinstall torch` without the index of CPU "
        "builds), or set DS_ACCELERATOR=cpu to run on CPUs on purpose."
    )
    with pytest.raises(UserError):
        choose_device()
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    require_usable_gpus()


def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(monkeypatch, "2.13.0", "13.0")
    (machine / "nvidia0").touch()
    with pytest.raises(UserError, match=r"torch 2\.13\.0, CUDA 13\.0 cannot use.*580 or newer.*no driver was found"):
        require_usable_gpus()
    (machine / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39\n")
    with pytest.raises(UserError, match=r"nvidia0 exists\).*and the driver is 535\.54\.03\. Install a newer driver"):
        require_usable_gpus()
    (machine / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
    with pytest.raises(UserError, match=r"the driver is 580\.65\.06; `nvidia-smi` may say"):
        require_usable_gpus()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"SLURM_GPUS_ON_NODE": "0"},
        {"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0", "LOCAL_SIZE": "2"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("machine")
def test_a_machine_without_gpus_is_none_to_complain_about(environment: dict[str, str]) -> None:
    require_usable_gpus(environment)


def test_gpus_that_are_there_may_be_hidden(machine: Path) -> None:
    (machine / "nvidia0").touch()
    require_usable_gpus({"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.usefixtures("machine")
def test_the_command_says_it_before_it_starts_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(cli.launch, "launch", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE=8"):
        cli.on_ranks([], load_recipe("nano"), lambda recipe: {}, False)


@pytest.mark.usefixtures("machine")
def test_deepspeed_is_told_of_a_machine_without_gpus_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns where it finds that out by itself; what is told must not pass for the user's own choice."""
    environment: dict[str, str] = {}
    devices.settle_accelerator(environment)
    assert environment == {"DS_ACCELERATOR": "cpu"}
    booked = {"SLURM_GPUS_ON_NODE": "8"}
    devices.settle_accelerator(booked)
    assert booked == {"SLURM_GPUS_ON_NODE": "8"}


# ---------------------------------------------------------------------- cores


@pytest.fixture
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that may use eight cores and was told nothing of threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_eight_cores")
def test_processes_of_one_machine_share_its_cores() -> None:
    torch.set_num_threads(8)
    distributed.share_cores(1)
    assert torch.get_num_threads() == 8
    distributed.share_cores(4)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_eight_cores")
def test_threads_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(7)
    distributed.share_cores(4)
    assert torch.get_num_threads() == 7
    torch.set_num_threads(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    distributed.share_cores(4)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_the_processor_to_others(given: dict[str, str], expected: str) -> None:
    """Said before torch is loaded, which is when it is read; what the user said stays."""
    outside = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    program = "import os, sys, pipeline; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env={**outside, **given}, capture_output=True, text=True
    )
    assert done.stdout == f"{expected} False\n"
