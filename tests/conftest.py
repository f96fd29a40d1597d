"""What all tests share: they run on the CPU, without a network, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch or deepspeed is imported anywhere.
os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"})

import pytest

from pipeline.ranks.shutdown import STOP_SIGNALS

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MLFLOW_TRACKING_URI")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    # pytest's own --fixtures (a list of fixtures) keeps its other name, --funcargs.
    group._arggroup.conflict_handler = "resolve"
    group.addoption("--fixtures", metavar="DIR", help="folder of recorded reference results for tests/parity")
    group.addoption("--data", metavar="DIR", help="folder of third-party data, with base2new/ or real6/ in it")


@pytest.fixture(scope="session", autouse=True)
def _outside_any_launch() -> None:
    """The tests are not a rank, whatever job the test run itself is part of; nor is what they start under nohup."""
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        # A shell starts what it puts into the background with SIGINT ignored, and what the tests start inherits that.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _environment_before_the_file() -> Iterator[None]:
    """What a file's own fixtures set (joining a process group does) must not reach the next file."""
    yield from _restored()


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """A test that joins a process group in this process sets variables that later tests must not see."""
    yield from _restored()


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder on a machine with an empty Hub cache and no network; returns the cache."""
    from huggingface_hub import constants

    from pipeline.hub import snapshots

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(snapshots, "_known", {})
    monkeypatch.setattr(snapshots, "_settings", {})
    return tmp_path / "cache"


def _restored() -> Iterator[None]:
    before = dict(os.environ)
    # A rank that leaves ignores what would end it, and so would every process that a later test starts.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    yield
    os.environ.clear()
    os.environ.update(before)
    with contextlib.suppress(ValueError):  # not the main thread: nothing could have been set either
        for number, handler in handlers.items():
            signal.signal(number, handler)
