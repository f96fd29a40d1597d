"""A process's session on a run, for both halves: signal handlers, process group, watchdog, and the claimed folder.

Work inside a session is stopped by signals, watched and recorded in run.json in the same way for sequences and
benchmarks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.base import FileRecipe
from pipeline.console.log import log_to_terminal
from pipeline.errors import Interrupted
from pipeline.ranks.shutdown import StopFlag, stop_on_signals
from pipeline.ranks.watchdog import Watchdog, collective_timeout
from pipeline.ranks.world import World, agree, barrier, init_world
from pipeline.runs.claimed import claimed


@dataclass(frozen=True)
class Session:
    """The run folder, the ranks, the stop flag and the watchdog of a process that works on a run."""

    path: Path  # the run folder, whose lock this session holds
    world: World
    stop: StopFlag  # whether a signal asked this process to stop
    watchdog: Watchdog

    def told_to_stop(self) -> bool:
        """Whether a signal asked any rank to stop. All ranks must call it."""
        return agree(self.stop.requested, self.world.device)

    def stop_if_told(self, place: str) -> None:
        """Raise Interrupted on all ranks when a signal asked any of them to stop. All ranks must call it.

        `place` completes the message "Stopped by a signal ..." and becomes the activity that the watchdog reports.
        """
        self.watchdog.beat(place, slow=True)
        if self.told_to_stop():
            raise Interrupted(f"Stopped by a signal {place}. Run the same command again to resume.")

    @contextlib.contextmanager
    def running(self, tracked: AbstractContextManager[None], write_state: Callable[[str], None]) -> Iterator[None]:
        """Run the block inside the tracker's run, with its status in run.json.

        Args:
            tracked: opens the tracker's run, and closes it with a status that depends on how the block ends.
            write_state: writes run.json with a status: "running" before the block, "stopped" or "failed" when it
                raises. A block that succeeds writes its own status.
        """
        try:
            with tracked:
                write_state("running")
                yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the block's error
                write_state("stopped" if isinstance(error, Interrupted) else "failed")
            if isinstance(error, Interrupted):
                barrier()  # no rank may exit before all were interrupted: a launcher may then terminate the others
            raise


@contextlib.contextmanager
def session(
    recipe: FileRecipe, watchdog_s: float | None, require: Callable[[World], object] = lambda _: None
) -> Iterator[Session]:
    """Claim the run folder of a recipe on all ranks while the block runs.

    Args:
        recipe: names the run folder, see `claim_run`.
        watchdog_s: seconds without progress on any rank after which the job ends; None: watchdog off.
        require: raises UserError where the recipe cannot be run by these ranks, before the folder is made.

    Raises:
        UserError: the folder belongs to another recipe or is in use by another process.
        Interrupted: a signal arrived while this waited for another process.
    """
    log_to_terminal()
    with stop_on_signals() as stop:
        world = init_world(collective_timeout(watchdog_s))
        require(world)
        with Watchdog(world, watchdog_s).watching() as watchdog, claimed(recipe, world, stop) as path:
            yield Session(path, world, stop, watchdog)
