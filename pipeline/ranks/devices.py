"""Devices: those that the user or Slurm made visible to a launch, and whether torch can use them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

GIVEN = "PIPELINE_VISIBLE_DEVICES"  # hands the variables below from the launching process to its ranks
# DeepSpeed's launcher overwrites these, one for each kind of accelerator, with the local numbers of the ranks. It does
# not touch HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and NVIDIA_VISIBLE_DEVICES, which the ranks inherit.
NUMBERED = (
    "CUDA_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
    "MLU_VISIBLE_DEVICES",
    "SDAA_VISIBLE_DEVICES",
    "SUPA_VISIBLE_DEVICES",
)
BOOKED = ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_TASK")  # name the GPUs that a Slurm job requested
NO_DEVICE = re.compile(r"\s*(-\d.*|NoDevFiles|none|void)?\s*", re.IGNORECASE)  # CUDA_VISIBLE_DEVICES without a GPU
FIRST_GPU = Path("/dev/nvidia0")
DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}  # oldest NVIDIA driver by major version of torch's CUDA
ON_PURPOSE = "set DS_ACCELERATOR=cpu to run on CPUs on purpose"


def given_devices(env: Mapping[str, str] = os.environ) -> str:
    """The visible devices of this process as JSON for `restore_devices`."""
    return json.dumps({name: env[name] for name in NUMBERED if name in env})


def restore_devices(env: MutableMapping[str, str] = os.environ) -> None:
    """Restore the visible devices of the launching process in a rank; must run before anything imports torch.

    DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES with 0, 1, ..., so the ranks would run on the machine's first
    GPUs, which may belong to another job; UUIDs and names of MIG devices are lost.
    """
    given = env.pop(GIVEN, None)
    if given is None:
        return
    for name in NUMBERED:
        env.pop(name, None)
    env.update(json.loads(given))


def require_usable_gpus(env: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where GPUs were requested or are present and torch cannot use any."""
    import torch

    if torch.cuda.is_available() or env.get("DS_ACCELERATOR") == "cpu":
        return
    reason = _expected(env)
    if reason is None:
        return
    driver = driver_version()
    if torch.version.cuda is None and torch.version.hip is None:
        why = "it is built without CUDA"
        fix = (
            "Install a build with CUDA (`make venv TORCH=cuda`, or `pip install --force-reinstall torch` without the "
            "index of CPU builds)"
        )
    else:
        cuda = torch.version.cuda or f"ROCm {torch.version.hip}"
        oldest = OLDEST_DRIVERS.get(cuda.split(".")[0])
        why = f"it is built for CUDA {cuda}" + (f", which needs a driver {oldest} or newer" if oldest else "")
        why += f", and the driver is {driver}" if driver else ", and no driver was found"
        fix = (
            "Install a newer driver, or a torch that is built for an older CUDA (indices are named at "
            "https://pytorch.org/get-started/previous-versions)"
        )
        if oldest and driver and int(driver.split(".")[0]) >= oldest:
            why += "; `nvidia-smi` may say what is wrong with them"
            fix = "Mend the driver, or start where the GPUs work"
    raise UserError(f"There are GPUs ({reason}) and {torch_build()} cannot use them: {why}. {fix}, or {ON_PURPOSE}.")


def _expected(env: Mapping[str, str]) -> str | None:
    """Evidence that this process should have GPUs, as text for an error; None where there is none."""
    for name in BOOKED:
        value = env.get(name, "")
        if value and value.split(":")[-1] != "0":  # "8", "0,1", "a100:2"
            return f"{name}={value}"
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not numbered_by_launcher(env):
        return None if NO_DEVICE.fullmatch(visible) else f"CUDA_VISIBLE_DEVICES={visible}"
    return f"{FIRST_GPU} exists" if FIRST_GPU.exists() else None


def numbered_by_launcher(env: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES was set by DeepSpeed's launcher, which numbers the ranks in it on CPUs too."""
    size = env.get("LOCAL_SIZE", "")
    numbers = ",".join(map(str, range(int(size)))) if size.isdecimal() else None
    return "CROSS_RANK" in env and env.get("CUDA_VISIBLE_DEVICES") == numbers


def settle_accelerator(env: MutableMapping[str, str] = os.environ) -> None:
    """Set DS_ACCELERATOR=cpu on a machine without GPUs; without it DeepSpeed logs a warning when it detects that."""
    import torch

    if not torch.cuda.is_available() and _expected(env) is None:
        env.setdefault("DS_ACCELERATOR", "cpu")


def driver_version() -> str | None:
    """The version of the loaded NVIDIA driver, None without one."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def torch_build() -> str:
    """The installed torch as text: "torch 2.13.0+cpu", "torch 2.13.0, CUDA 13.0"."""
    import torch

    build = str(torch.__version__)
    if torch.version.cuda and "+cu" not in build:
        build += f", CUDA {torch.version.cuda}"
    elif torch.version.cuda is None and torch.version.hip is None and "+" not in build:
        build += ", without CUDA"
    return f"torch {build}"


def choose_device(name: torch.device | str | None = None) -> torch.device | str:
    """The device of a single process: `name`, else a GPU where there is one.

    Raises UserError where GPUs were requested or are present and torch cannot use them.
    """
    import torch

    if name is not None:
        return name
    require_usable_gpus()
    return "cuda" if torch.cuda.is_available() else "cpu"


def described(device: torch.device, ranks: int) -> str:
    """The ranks and devices of a run as text, for its first log line."""
    import torch

    who = f"{ranks} rank{'s' * (ranks > 1)}"
    if device.type != "cuda":
        return f"{who} on CPUs ({torch_build()})"
    count = torch.cuda.device_count()
    here = f"{count} GPU{'s' * (count > 1)} visible here: {torch.cuda.get_device_name(device)}"
    return f"{who}, {here} ({torch_build()})"
