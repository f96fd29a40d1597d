"""A task of one's own, as `new-task` makes it, for the tests of what is added to a run."""

from __future__ import annotations

from pathlib import Path

from data_prep.own_task import NewTask, make_task
from tests.tiny_clip import picture


def make_mine(tmp_path: Path) -> None:
    """Make the task Mine in the folder `own`, of pictures in `photos` and the table mine.csv, which are made too."""
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number + 50))
    table = tmp_path / "mine.csv"
    table.write_text("image,question,answer\n" + "".join(f"{n}.png,what is it?,thing {n}\n" for n in range(6)))
    make_task(NewTask("Mine", tmp_path / "own", max_new_tokens=3), tmp_path / "photos", table)
