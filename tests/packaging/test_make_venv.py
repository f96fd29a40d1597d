"""Which torch `make venv` installs, says and remembers; pip, curl and nvidia-smi are stand-ins."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import PROJECT

TOOLS = ("make", "sh", "cat", "cmp", "touch", "rm")


def stand_in(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with tools, a PyTorch index that answers, no GPU, and an environment whose installation was begun."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    stand_in(tmp_path / "bin" / "curl", 'case "$*" in *cu999*) exit 22;; esac')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    stand_in(tmp_path / "venv" / "bin" / "python", f'echo "$@" >> {tmp_path}/installed')
    (tmp_path / "venv" / ".incomplete").touch()
    return tmp_path


def make(made: Path, torch: str = "") -> tuple[int, str, list[str]]:
    """Exit code and output of `make venv`, and what pip was asked for."""
    (made / "installed").unlink(missing_ok=True)
    done = subprocess.run(
        ["make", "-s", "venv", f"VENV={made}/venv", "PYTHON=true", f"TORCH={torch}"],
        cwd=PROJECT,
        env={"PATH": f"{made}/bin:{made}/venv/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    asked = (made / "installed").read_text().splitlines() if (made / "installed").exists() else []
    return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture(autouse=True)
def _true_for_python(made: Path) -> None:
    stand_in(made / "bin" / "true", "exit 0")


def test_without_a_gpu_in_sight_it_takes_cpu_builds_and_says_how_to_get_others(made: Path) -> None:
    code, said, asked = make(made)
    assert code == 0
    assert "torch for cpu (no nvidia-smi here; for GPUs elsewhere: make venv TORCH=cuda)" in said
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in asked[-1]
    assert make(made) == (0, "", [])


def test_with_a_gpu_it_takes_the_usual_build(made: Path) -> None:
    stand_in(made / "bin" / "nvidia-smi", "exit 0")
    _, said, asked = make(made)
    assert "torch for cuda (nvidia-smi is here)" in said
    assert "index" not in asked[-1]


def test_another_build_renews_the_environment_and_stays(made: Path) -> None:
    make(made)
    _, said, asked = make(made, "cuda")
    assert "torch for cuda (as TORCH says)" in said
    assert "uninstall" in asked[0]  # pip takes torch 2.13.0+cpu for the torch==2.13.0 that is asked for
    assert "index" not in asked[1]
    assert make(made) == make(made, "cuda") == (0, "", [])
    assert "whl/cu126" in make(made, "cu126")[2][1]


@pytest.mark.parametrize(("torch", "sentence"), [("gpu", "TORCH is 'gpu'; expected cpu"), ("cu999", "not answer")])
def test_a_build_that_is_none_is_refused(made: Path, torch: str, sentence: str) -> None:
    code, said, asked = make(made, torch)
    assert (code, sentence in said) == (2, True)
    assert not [line for line in asked if "pip" in line]
