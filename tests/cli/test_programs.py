"""The programs beside `pipeline` show the command that runs them, for users to type."""

from __future__ import annotations

import runpy
import sys

import pytest

from pipeline import __version__


@pytest.mark.parametrize("module", ["data_prep", "data_prep.nano", "pipeline.bench"])
def test_the_usage_is_a_command(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", "nothing"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert f"Usage: python -m {module} " in capsys.readouterr().err


@pytest.mark.parametrize("module", ["data_prep", "pipeline.bench"])
def test_a_program_shows_the_version(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, f"pipeline {__version__}\n")
