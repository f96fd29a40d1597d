"""What installing the project asks for, and what its Makefile offers."""

from __future__ import annotations

import re
import subprocess

from pipeline.config import PROJECT


def test_the_build_asks_for_a_setuptools_that_reads_the_licence() -> None:
    """A licence as an SPDX expression is read since setuptools 77; older ones refuse the whole file."""
    text = (PROJECT / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^license = "Apache-2.0"$', text, re.MULTILINE)
    (least,) = re.findall(r'requires = \["setuptools>=(\d+)"\]', text)
    assert int(least) >= 77


def test_what_the_shown_commands_write_is_ignored() -> None:
    ignored = (PROJECT / ".gitignore").read_text("utf-8").splitlines()
    assert {"/adapter/", "/smaller/", "/scene.png", "first-steps/"} <= set(ignored)


def test_the_port_of_the_tracking_pages_can_be_chosen() -> None:
    shown = ["make", "--dry-run", "-C", str(PROJECT), "ui"]
    assert "--port 5000" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert "--port 5999" in subprocess.run([*shown, "PORT=5999"], capture_output=True, text=True, check=True).stdout
