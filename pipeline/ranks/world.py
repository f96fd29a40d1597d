"""The process group: joining it, this process's rank, and collectives on Python objects, flags and errors."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from pipeline.errors import UserError, for_user
from pipeline.files.descriptors import raise_descriptor_limit
from pipeline.ranks.devices import described, require_usable_gpus
from pipeline.ranks.environment import ALONE, free_port, launched_place, ranks_per_node
from pipeline.ranks.heap import keep_freed_blocks
from pipeline.ranks.remote_error import RemoteError
from pipeline.ranks.shutdown import leave_from_wait

log = logging.getLogger("pipeline.ranks.world")
T = TypeVar("T")
# Longer than the watchdog's limit, so that the watchdog ends a hanging job; runs pass `watchdog.collective_timeout`.
TIMEOUT = datetime.timedelta(minutes=40)
ROUND_S = 10.0  # seconds between two rounds in which all ranks check for a stop signal while a thread works


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of ranks and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def init_world(timeout: datetime.timedelta = TIMEOUT) -> World:
    """Join the process group (gloo on CPUs, NCCL on GPUs) and return this process's place in it; may be called again.

    A collective fails when a rank waits in it longer than `timeout`, also in the groups that DeepSpeed makes. Raises
    UserError where GPUs were requested or are present and torch cannot use them.
    """
    raise_descriptor_limit()
    place = launched_place() or ALONE
    rank, size, local = place.rank, place.size, place.local_rank
    require_usable_gpus()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        share_cores(int(os.environ["LOCAL_SIZE"]))
        keep_freed_blocks()
    # DeepSpeed requires these variables and takes LOCAL_RANK as the number of the device: with one visible device per
    # task (Slurm's --gpus-per-task, --gpu-bind) that is 0 in every task.
    device_number = device.index if device.type == "cuda" else local
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(device_number)})
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if size == 1:
            os.environ.setdefault("MASTER_PORT", str(free_port()))
        elif "MASTER_PORT" not in os.environ:
            raise UserError(
                f"{size} processes were started but MASTER_ADDR and MASTER_PORT are not set. "
                "Start them with `deepspeed`, `torchrun` or `python -m pipeline run`, or export both variables."
            )
        # DeepSpeed makes groups without a timeout; torch's default (10 minutes with NCCL) would apply to them.
        c10d = dist.distributed_c10d
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
        with leave_from_wait("the other ranks") if size > 1 else contextlib.nullcontext():
            dist.init_process_group(backend, timeout=timeout)
        if rank == 0:
            log.info("%s", described(device, size))
    return World(rank, size, local, device)


def share_cores(processes: int) -> None:
    """Set torch's threads to this process's share of the cores, with `processes` on the machine, unless they were set.

    By default each process starts a thread per core, and more threads than cores slow each other down. A Slurm task
    that has CPUs of its own keeps all of them.
    """
    cores = len(os.sched_getaffinity(0))
    by_default = torch.get_num_threads() in (cores, os.cpu_count(), psutil.cpu_count(logical=False))
    said = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_CPUS_PER_TASK"} & os.environ.keys()
    if processes > 1 and by_default and not said:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // processes)))


def close_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's object, on every rank. All ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's object in rank order, on every rank. All ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def agreed_node_size() -> int:
    """Return the ranks per node, the same on every rank; 1 where nodes differ. All ranks must call it.

    Each rank knows only its own node, and ranks that derive different process groups from it would deadlock.
    """
    sizes = set(gather_objects(ranks_per_node()))
    return sizes.pop() if len(sizes) == 1 else 1


def neighbours(world: World, size: int) -> dist.ProcessGroup:
    """The process group of the `size` consecutive ranks that this one belongs to. All ranks must call it."""
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
    return groups[world.rank // size]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a tensor over the ranks (a new tensor)."""
    total = values.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def agree(flag: bool, device: torch.device) -> bool:
    """True on every rank if the flag is set on any of them."""
    value = torch.tensor(float(flag), device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def on_main(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; an exception of rank 0 is raised on every rank.

    The other ranks raise the error that `RemoteError` carries: of the same class where it is one of the project's, so
    that all ranks end with the same exit code.
    """
    result: T | None = None
    error: Exception | None = None
    if world.main:
        try:
            result = work()
        except Exception as caught:
            error = caught
    result, remote = broadcast_object((result, None if error is None else RemoteError.of(error, world.rank)))
    if error is not None:
        raise error
    if remote is not None:
        raise remote.raised()
    return result  # type: ignore[return-value]


def in_rounds(world: World, thread: threading.Thread | None, each_round: Callable[[], object], seconds: float) -> None:
    """Start this rank's `thread`, if it has one, and return when the threads of all ranks have ended.

    All ranks must call it. About every `seconds` they call `each_round` together, so that no rank waits in one
    collective, up to its timeout, for as long as the work takes.

    Args:
        world: this process's place.
        thread: the work of this rank; None where it has none.
        each_round: called on all ranks in every round, for example to check for a stop signal.
        seconds: length of a round.
    """
    if thread is not None:
        thread.start()
    running = True
    while running:
        if thread is not None:
            thread.join(seconds)
        running = agree(thread is not None and thread.is_alive(), world.device)
        each_round()


def on_main_in_rounds(world: World, work: Callable[[], T], each_round: Callable[[], object]) -> T:
    """`on_main` for long work: meanwhile all ranks call `each_round` together every ROUND_S seconds.

    When `each_round` raises, the work is abandoned in its daemon thread, which does not keep the process alive.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="work", daemon=True) if world.main else None
    in_rounds(world, thread, each_round, ROUND_S)

    def result() -> T:
        if errors:
            raise errors[0]
        return results[0]

    return on_main(world, result)


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; an error that `for_user` has a message for is raised on all ranks, whichever met it.

    Otherwise the other ranks would wait for the failed one in their next collective. A bug is raised only on the rank
    that met it; the launcher then ends the others.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        if for_user(caught) is None:
            raise
        error = caught
    rank = dist.get_rank() if dist.is_initialized() else 0
    remotes = gather_objects(None if error is None else RemoteError.of(error, rank))
    if error is not None:
        raise error
    for remote in remotes:
        if remote is not None:
            raise remote.raised()
    return result  # type: ignore[return-value]
