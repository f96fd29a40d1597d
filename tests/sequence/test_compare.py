"""The shares of a comparison's runs, and how many run at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from pipeline.config.compared import load_comparison
from pipeline.errors import Interrupted, UserError
from pipeline.ranks import side_by_side
from pipeline.sequence import compare
from pipeline.sequence.compare import Failure, RunsFailed, Share, run_missing


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


def runs_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> dict[str, Failure]:
    """What failed of three runs on nano, each of which is the shell script; `$title` is the run's in it."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\ntitle=$(basename "$4" .yaml)\n' + script)
    stand_in.chmod(0o755)
    monkeypatch.setattr(side_by_side.sys, "executable", str(stand_in))
    names = ["modalprompt", "joint", "sequential"]
    place = f"run_dir={tmp_path}/runs/{{method}}-s{{seed}}"
    comparison = load_comparison("nano", [place, "train.processes=1"], names, [0])
    return run_missing(comparison, tmp_path / "out", 1, Share(), lambda _: None)


DONE = """mkdir -p "$runs/$title"; echo '{"status": "done"}' > "$runs/$title/run.json"; exit 0\n"""


def test_all_others_run_whatever_one_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level(logging.INFO)
    script = f"runs={tmp_path}/runs\n" + (
        """case $title in
        modalprompt-s0) echo '{"error": "In use by another job.", "exit_code": 75}'; exit 75;;
        joint-s0) kill -9 $$;;
        esac
        echo "12:00:00 after stage 1 (A): A 50.0"
        """
        + DONE
    )
    failed = runs_of(tmp_path, monkeypatch, script)
    assert {title: failure.code for title, failure in failed.items()} == {"modalprompt-s0": 75, "joint-s0": -9}
    log = tmp_path / "out" / "logs" / "modalprompt-s0.log"
    assert failed["modalprompt-s0"].why == f"In use by another job. Its output is in {log}."
    assert failed["joint-s0"].why.startswith("it was killed by signal 9, as where memory runs out. Its output is in")
    assert "sequential-s0: after stage 1 (A): A 50.0" in caplog.text and "sequential-s0: done" in caplog.text


def test_a_stop_says_what_had_failed_and_starts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "case $title in modalprompt-s0) exit 3;; esac\nwhile true; do sleep 0.05; done\n"
    timer = threading.Timer(1.5, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    with pytest.raises(Interrupted, match=r"(?s)1 had failed before:\n- modalprompt-s0: it ended with exit code 3\."):
        runs_of(tmp_path, monkeypatch, script)
    assert not (tmp_path / "out" / "logs" / "sequential-s0.log").exists()


@pytest.mark.parametrize(("codes", "code"), [((2, 2), 2), ((75, 75), 75), ((2, 75), 1), ((1, 75), 1), ((-9,), 1)])
def test_the_exit_code_is_that_of_the_runs_where_they_agree(codes: tuple[int, ...], code: int) -> None:
    failed = {f"run{number}": Failure("why.", found) for number, found in enumerate(codes)}
    error = RunsFailed.of(failed, 1, "nano", Path("out", "report.html"))
    assert error.exit_code == code and f"{len(codes)} of {len(codes) + 1} runs failed" in str(error)
    assert "out/report.html shows them alone" in str(error) and "- run0: why." in str(error)
