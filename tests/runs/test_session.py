"""What a session writes when a run ends, however it ends, and how it stops."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.base import FileRecipe
from pipeline.errors import Interrupted, UserError
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, init_world
from pipeline.runs.session import Session, session


def made(folder: Path) -> Session:
    world = init_world()
    return Session(folder, world, StopFlag(), Watchdog(world, None))


@contextlib.contextmanager
def tracked(said: list[str]) -> Iterator[None]:
    """Stands in for the tracker's run."""
    said.append("opened")
    try:
        yield
    finally:
        said.append("closed")


def test_a_block_that_ends_well_is_called_what_it_says_itself(tmp_path: Path) -> None:
    said: list[str] = []
    with made(tmp_path).running(tracked(said), said.append):
        said.append("done")
    assert said == ["opened", "running", "done", "closed"]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("x"), "failed"), (KeyboardInterrupt(), "failed"), (Interrupted("x"), "stopped")]
)
def test_a_block_that_raises_leaves_its_status_behind_the_tracker_s_run(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    said: list[str] = []
    with pytest.raises(type(error)), made(tmp_path).running(tracked(said), said.append):
        raise error
    assert said == ["opened", "running", "closed", status]


def test_a_disk_that_is_full_does_not_hide_why_a_run_ended(tmp_path: Path) -> None:
    def write(status: str) -> None:
        if status != "running":
            raise OSError("no space left")

    with pytest.raises(ValueError, match="the reason"), made(tmp_path).running(contextlib.nullcontext(), write):
        raise ValueError("the reason")


def test_who_is_told_to_stop_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    here = made(tmp_path)
    here.stop_if_told("between two stages")
    here.stop.requested = True
    with pytest.raises(Interrupted, match=r"^Stopped by a signal between two stages\. Run the same command again"):
        here.stop_if_told("between two stages")


def test_a_session_claims_the_folder_and_hears_signals_while_it_lasts(tmp_path: Path) -> None:
    recipe = FileRecipe(name="a", run_dir=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM)
    with session(recipe, None) as here:
        assert here.path == tmp_path / "run"
        assert (here.path / "config.yaml").is_file()
        assert not here.told_to_stop()
        signal.raise_signal(signal.SIGTERM)
        assert here.told_to_stop()
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_does_not_fit_the_ranks_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    def refuse(world: World) -> None:
        raise UserError(f"{world.size} is no good number of ranks")

    recipe = FileRecipe(name="a", run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="no good number"), session(recipe, None, refuse):
        pytest.fail("went on")
    assert not (tmp_path / "run").exists()
