"""One process's part in a run: the claimed folder, the ranks, and what is written when the run ends; for both halves.

It begins with the signal handlers and ends with the lock of the run folder, so that whatever a run does in between is
stopped, watched and recorded in the same way.
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
from pipeline.runs.lock import claimed


@dataclass(frozen=True)
class Session:
    """What everything that works on a run has in common."""

    path: Path  # the run folder, which no other process writes to
    world: World
    stop: StopFlag  # whether a signal asked this process to stop
    watchdog: Watchdog

    def told_to_stop(self) -> bool:
        """Whether a signal asked any rank to stop; all ranks call it together."""
        return agree(self.stop.requested, self.world.device)

    def stop_if_told(self, place: str) -> None:
        """Raise Interrupted on all ranks, which call it together, when a signal asked any of them to stop.

        `place` completes the message "Stopped by a signal ..." and is what the watchdog reports from here on.
        """
        self.watchdog.beat(place, slow=True)
        if self.told_to_stop():
            raise Interrupted(f"Stopped by a signal {place}. Run the same command again to go on.")

    @contextlib.contextmanager
    def running(self, tracked: AbstractContextManager[None], write_state: Callable[[str], None]) -> Iterator[None]:
        """Do the block inside the tracker's run, with run.json saying how it stands.

        Args:
            tracked: opens the tracker's run and closes it with the way in which the block ends.
            write_state: writes run.json with a status: "running" before the block, "stopped" or "failed" after one
                that raises. What a block that ends well is called it says itself.
        """
        try:
            with tracked:
                write_state("running")
                yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                write_state("stopped" if isinstance(error, Interrupted) else "failed")
            if isinstance(error, Interrupted):
                barrier()  # all ranks have heard of it; the first to leave may make a launcher end the others
            raise


@contextlib.contextmanager
def session(
    recipe: FileRecipe, watchdog_s: float | None, require: Callable[[World], object] = lambda _: None
) -> Iterator[Session]:
    """Claim the run folder of a recipe and work on it with all ranks while the block runs.

    Args:
        recipe: names the run folder, see `claim_run`.
        watchdog_s: seconds without progress on any rank after which the job ends; None: it may hang for ever.
        require: raises UserError where the recipe does not fit these ranks, before the folder is touched.

    Raises:
        UserError: the folder belongs to another recipe or is in use by another process.
        Interrupted: a signal came while another process was waited for.
    """
    log_to_terminal()
    with stop_on_signals() as stop:
        world = init_world(collective_timeout(watchdog_s))
        require(world)
        with Watchdog(world, watchdog_s).watching() as watchdog, claimed(recipe, world, stop) as path:
            yield Session(path, world, stop, watchdog)
