"""Selections of active prompt learning against recorded ones (`--fixtures DIR`, folder active/)."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.clip.active import acquire
from pipeline.clip.active.balance import pcb
from pipeline.clip.active.class_guided import Clusters, free_labels, guided_features, pick_from_clusters
from pipeline.clip.active.pool import PoolView, unit_length

VALUES = 1e-6  # entropies, squared norms and guided features


class Recorded:
    """One folder: the pool's arrays and the cases of each method."""

    def __init__(self, folder: Path) -> None:
        self.arrays = load_file(folder / "pool.safetensors")
        self.cases: list[dict[str, Any]] = json.loads((folder / "cases.json").read_text("utf-8"))

    def of(self, *methods: str) -> list[dict[str, Any]]:
        found = [case for case in self.cases if case["method"] in methods]
        assert found, f"no recorded case of {', '.join(methods)}"
        return found

    def view(self, case: dict[str, Any]) -> PoolView:
        features, logits = self.arrays["features"], self.arrays["logits"]
        return PoolView.of(features, logits, case.get("labelled", []), case["unlabelled"])


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest) -> Recorded:
    root = request.config.getoption("--fixtures")
    if not root or not (Path(root) / "active").is_dir():
        pytest.skip("no recorded results: give --fixtures DIR with a folder active/")
    return Recorded(Path(root).resolve() / "active")


def test_entropy(recorded: Recorded) -> None:
    for case in recorded.of("entropy"):
        view = recorded.view(case)
        scores = acquire.entropy_scores(view.probabilities(case["unlabelled"]))
        np.testing.assert_allclose(scores, recorded.arrays["entropy.scores"], atol=VALUES, rtol=0)
        assert acquire.entropy(view, case["count"]) == case["selected"]


def test_coreset(recorded: Recorded) -> None:
    for case in recorded.of("coreset"):
        assert acquire.coreset(recorded.view(case), case["count"]) == case["selected"], case["name"]


def test_badge(recorded: Recorded) -> None:
    for case in recorded.of("badge"):
        view, name = recorded.view(case), case["name"]
        batch = case["batch"] if name.endswith("_released") else None
        rows = np.array(case["unlabelled"])
        factors, features = acquire.gradient_factors(view.probabilities(view.unlabelled)), view.features[rows]
        if batch is not None:
            sources = np.array(acquire.released_sources(len(rows), batch))
            factors, features = factors[sources] * (sources >= 0)[:, None], features[sources]
        norms = acquire.squared_norms(factors, features)
        np.testing.assert_allclose(norms, recorded.arrays[f"{name}.squared_norms"], atol=VALUES, rtol=0)
        generator = np.random.RandomState(case["numpy_seed"])
        assert acquire.badge(view, case["count"], generator, batch) == case["selected"], name


def test_pcb(recorded: Recorded) -> None:
    for case in recorded.of("pcb"):
        guesses = recorded.arrays["logits"][case["candidates"]].argmax(axis=1).tolist()
        released = case["name"].endswith("_released")
        found = pcb(
            case["candidates"],
            guesses,
            case["labelled_counts"],
            case["count"],
            random.Random(case["python_seed"]),
            released,
        )
        assert found == case["selected"], case["name"]
        by_row = dict(zip(case["candidates"], guesses, strict=True))
        assert [by_row[row] for row in found] == case["guesses"]


def test_class_guided(recorded: Recorded) -> None:
    for case in recorded.of("cb", "cbsq"):
        name, rows = case["name"], [*case["labelled"], *case["unlabelled"]]
        texts = recorded.arrays["text_features"].astype(np.float64)
        view = recorded.view(case)
        guided = guided_features(view.features[rows], view.logits[rows], texts)
        np.testing.assert_allclose(guided, recorded.arrays[f"{name}.guided"], atol=VALUES, rtol=0)
        numbers = recorded.arrays[f"{name}.clusters"].astype(np.int64)
        clusters = Clusters(numbers, recorded.arrays[f"{name}.centres"].astype(np.float64))
        places = pick_from_clusters(unit_length(guided), clusters, len(case["labelled"]), case["count"])
        picked = [rows[place] for place in places]
        assert picked == case["selected"], name
        if case["method"] == "cbsq":
            known = replace(view, labelled=tuple(case["labelled"]))
            free = free_labels(known, recorded.arrays["labels"][case["labelled"]].tolist(), picked)
            true = recorded.arrays["labels"].tolist()
            assert [true[row] for row in picked] == case["true_labels"]
            assert [free.get(row, true[row]) for row in picked] == case["labels"], name
            assert len(free) == case["saved"]


def test_first_round(recorded: Recorded) -> None:
    for case in recorded.of("random"):
        found = acquire.sample(range(case["population"]), case["count"], random.Random(case["python_seed"]))
        assert found == case["selected"]
