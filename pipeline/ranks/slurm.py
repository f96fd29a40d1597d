"""Commands as a user of Slurm enters them: those that a verb advises to run next."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.files.paths import command

SCRIPT = "slurm/run_sequence.sh"
BY_SCRIPT = {"run": (), "train": ("--train",), "evaluate": ("--evaluate",)}  # its options for verbs that it starts
OPTIONS = "OPTIONS"  # stands for sbatch's options, as FILE does for a file
SECONDS = 60  # of a minute, the unit of --time


def next_command(verb: str, *arguments: str | Path, env: Mapping[str, str] = os.environ) -> str:
    """A command that can be pasted into a shell: where there is Slurm, one that starts a job.

    Verbs with ranks are the project's script in `sbatch`, others one task in `sbatch` or, where they print an answer,
    in `srun`. Resources are those of the job that this process is in, else OPTIONS stands for them.
    """
    plain = command(verb, *arguments)
    if not (has_slurm(env) and (verb not in BY_SCRIPT or Path(SCRIPT).is_file())):
        return plain
    if verb in BY_SCRIPT:
        return " ".join(["sbatch", resources(env), SCRIPT, shlex.join([*BY_SCRIPT[verb], *map(str, arguments)])])
    if verb == "add":  # starts the ranks of one node by itself
        options = _shared(env)
        cpus = _count(env.get("SLURM_CPUS_ON_NODE"))
        if cpus and not any(option.startswith("--cpus-per-gpu") for option in options):
            options.append(f"--cpus-per-task={cpus}")
        return f"sbatch --nodes=1 --ntasks=1 {' '.join(options) or OPTIONS} --wrap {shlex.quote(plain)}"
    return f"srun --nodes=1 --ntasks=1 {_one_gpu(env)}{plain}"


def has_slurm(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is in a Slurm job, or on a machine from which one can be submitted."""
    return "SLURM_JOB_ID" in env or shutil.which("sbatch", path=env.get("PATH", "")) is not None


def resources(env: Mapping[str, str] = os.environ) -> str:
    """The options of sbatch for a job like this one; OPTIONS outside of one."""
    nodes = _count(env.get("SLURM_JOB_NUM_NODES"))
    if not nodes:
        return OPTIONS
    options = [f"--nodes={nodes}", *_shared(env)]
    tasks, cpus = _count(env.get("SLURM_NTASKS_PER_NODE")), _count(env.get("SLURM_CPUS_ON_NODE"))
    if tasks:
        options.append(f"--ntasks-per-node={tasks}")
        options += [f"--cpus-per-task={cpus // tasks}"] if cpus >= tasks and "SLURM_GPUS_ON_NODE" not in env else []
    return " ".join(options)


def _shared(env: Mapping[str, str]) -> list[str]:
    """Partition, GPUs and time of this process's job, as options; none outside of one."""
    found = []
    if partition := env.get("SLURM_JOB_PARTITION"):
        found.append(f"--partition={shlex.quote(partition)}")
    gpus, cpus = _count(env.get("SLURM_GPUS_ON_NODE")), _count(env.get("SLURM_CPUS_ON_NODE"))
    if gpus:
        found.append(f"--gpus-per-node={gpus}")
        found += [f"--cpus-per-gpu={cpus // gpus}"] if cpus >= gpus else []
    begun, ends = _count(env.get("SLURM_JOB_START_TIME")), _count(env.get("SLURM_JOB_END_TIME"))
    if ends > begun > 0:  # set since Slurm 22.05
        found.append(f"--time={-(-(ends - begun) // SECONDS)}")
    return found


def _one_gpu(env: Mapping[str, str]) -> str:
    """The GPU of a task that answers, unless the job of this process has none."""
    in_job = "SLURM_JOB_ID" in env
    return "" if in_job and not _count(env.get("SLURM_GPUS_ON_NODE")) else "--gpus-per-node=1 "


def _count(text: str | None) -> int:
    """A number of Slurm's, such as "8" or "a100:8"; 0 for another text."""
    last = (text or "").split(":")[-1]
    return int(last) if last.isdecimal() else 0
