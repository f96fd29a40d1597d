"""The shares of a comparison's runs, and how many run at once."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.config.compared import load_comparison
from pipeline.errors import UserError
from pipeline.sequence import compare
from pipeline.sequence.compare import Share


def test_shares_are_all_runs_each_once() -> None:
    runs = load_comparison("nano", (), ["modalprompt", "joint", "sequential"], [0, 1]).runs
    shares = [Share.read(f"{number}/4").taken(runs) for number in (1, 2, 3, 4)]
    assert sorted(run.title for share in shares for run in share) == sorted(run.title for run in runs)
    assert Share.read(None).taken(runs) == list(runs)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", ""])
def test_a_share_that_is_none_is_said(text: str) -> None:
    with pytest.raises(UserError, match=r"expected NUMBER/OF, such as 2/8"):
        Share.read(text)


def test_runs_at_once_follow_from_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert len(compare._places(None, None, 4)) == 1, "a run takes every GPU where it does not say how many"
    assert compare._places(None, 2, 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert len(compare._places(4, None, 1)) == 4
    with pytest.raises(UserError, match="--jobs is 5, and 4 GPUs are visible"):
        compare._places(5, None, 1)
