"""This process's rank and world size, read from the environment that torchrun, deepspeed or srun set.

Nothing heavy is imported at the top, because a process reads its rank before it loads torch.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UserError

USUAL_NODE = 8  # GPUs per node that are assumed when a job is planned on a machine without GPUs
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """A process among the ranks of its launch."""

    rank: int
    size: int
    local_rank: int  # among the ranks of its machine


ALONE = Place(0, 1, 0)


def launched_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """The rank of this process as torchrun or deepspeed set it, else srun with several tasks; None without them."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK") or 0))
    tasks = int(env.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" in env and tasks > 1:
        return Place(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID") or 0))
    return None


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank; 0 where no launcher started it."""
    return (launched_place(env) or ALONE).rank


def is_distributed(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun, deepspeed or srun (with several tasks) started this process as one of its ranks."""
    return launched_place(env) is not None


def require_srun(env: Mapping[str, str] = os.environ) -> None:
    """Raise UserError in the batch shell of a Slurm job with several tasks: Slurm gives it the variables of task 0."""
    if "RANK" not in env and is_distributed(env) and "SLURM_STEP_ID" not in env:
        raise UserError(
            f"This is the shell of Slurm job {env.get('SLURM_JOB_ID', '?')} and not one of its {env['SLURM_NTASKS']} "
            "tasks. Submit slurm/run_sequence.sh, which starts them, or put `srun` before the command (and export "
            "MASTER_ADDR and MASTER_PORT)."
        )


def launched_ranks_per_node(env: Mapping[str, str] = os.environ) -> int | None:
    """Return the ranks per node that torchrun (LOCAL_WORLD_SIZE), deepspeed (LOCAL_SIZE) or Slurm set; else None."""
    told = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or _tasks_of_slurm(env)
    return int(told) if told else None


def ranks_per_node(env: Mapping[str, str] = os.environ) -> int:
    """Return the ranks on this machine: the launcher's number, else one per GPU, else USUAL_NODE.

    The launcher's number comes first because a Slurm task may see only one GPU of its node.
    """
    told = launched_ranks_per_node(env)
    if told:
        return told
    import torch

    return torch.cuda.device_count() or USUAL_NODE


def _tasks_of_slurm(env: Mapping[str, str]) -> str | None:
    """Return the tasks per node of a Slurm step; None outside a step and where its nodes have unequal numbers.

    Slurm writes "8(x2)" for two nodes of eight tasks, "8,4" for unequal ones.
    """
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "") if "SLURM_PROCID" in env else ""
    found = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    return found[1] if found else None


def free_port() -> int:
    """A TCP port of this machine that is free at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def bound(port: int, host: str = LOOPBACK) -> socket.socket:
    """A socket bound to a port, 0: any free one; raises UserError for a port in use, before anything is loaded.

    `listen` is called where the address is printed: from then on an early client waits and is not refused.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        other = "--port" if host == LOOPBACK else "--port or --host"
        raise UserError(f"cannot listen at {host}:{port} ({error}); choose another {other}.") from error
    return listener
