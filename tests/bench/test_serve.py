"""The load test asks every question of a real service and gets what `predict` answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.bench.__main__ import app
from pipeline.config.paths import PROJECT
from tests.adapters import save_adapter, save_models


@pytest.mark.e2e
def test_the_service_under_load_answers_as_one_by_one(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "tiny-adapter", save_models(tmp_path))
    done = CliRunner().invoke(app, ["serve", str(adapter), "--clients", "4", "--requests", "12", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["folder"], found["clients"], found["requests"]) == ("tiny-adapter", 4, 12)
    assert found["same_answers"] == {"own": 1.0}
    for numbers in found["variants"].values():
        assert numbers["requests_per_s"] > 0
        assert numbers["latency_p95_s"] >= numbers["latency_p50_s"] > 0
    assert found["ratios"]["one by one"]["own"]["requests_per_s"] > 0


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--engines", "own,part"])
    assert done.exit_code == 2 and "No engine 'part'; expected some of own, vocabulary, parts." in done.stderr


@pytest.mark.e2e
def test_two_checkouts_are_asked_the_same_by_turns(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "tiny-adapter", save_models(tmp_path))
    asked = ["--clients", "1", "3", "--requests", "24", "--rounds", "2", "--tokens", "3"]
    done = CliRunner().invoke(app, ["clients", str(adapter), "--before", str(PROJECT), *asked, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found["variants"]) == [f"{count} clients, {name}" for count in (1, 3) for name in ("before", "now")]
    assert all(rate > 0 for rates in found["variants"].values() for rate in rates.values())
    for count in (1, 3):
        ratios = found["ratios"]["before"][f"{count} clients"]
        assert 0 < ratios["tokens_per_s, least"] <= ratios["tokens_per_s"] <= ratios["tokens_per_s, most"]
    assert found["same_answers"] is True
    assert found["cache_peak_bytes"]["before"] > 0 and found["cache_peak_bytes"]["now"] > 0


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["clients", "--before", str(tmp_path)])
    assert done.exit_code == 2
    assert "expected a checkout of the project" in " ".join(done.output.split())


def test_a_load_without_bounds_is_refused(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["serve", str(tmp_path), "--clients", "100000"]).exit_code == 2


def test_a_folder_that_holds_nothing_to_serve_is_refused(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["serve", str(tmp_path)]).exit_code == 2
