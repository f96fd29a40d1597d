"""Ranks that see other files than rank 0, as on a network file system, evaluate with it all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import torchrun


@pytest.mark.gloo
def test_what_is_still_to_be_answered_is_what_rank_0_says(tmp_path: Path) -> None:
    torchrun(["-m", "tests.prompts.stale_view", str(tmp_path)], 2, limit_s=120)
    scores = {(tmp_path / f"{rank}.score").read_text() for rank in (0, 1)}
    assert len(scores) == 1
    assert len((tmp_path / "now" / "a.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "stale").exists()
