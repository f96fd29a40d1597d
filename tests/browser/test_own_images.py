"""Fifty images of one's own in four classes, labelled on the page over three rounds, end with a classifier."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.sources import colour_shapes
from pipeline.clip.benchmark.classify import classify
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK
from pipeline.ranks.environment import free_port
from tests.browser.chromium import DESKTOP, chromium
from tests.browser.test_labelling_page import press, shown, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CLASSES = ("red_circle", "blue_square", "green_triangle", "yellow_cross")
IMAGES, ROUNDS, PER_ROUND = 50, 3, 10
HELD_OUT = 3  # images per class that are no part of the fifty


def save_photos(folder: Path) -> dict[str, str]:
    """Fifty drawn images with the names that a phone gives them, and classes.txt; returns the class of each."""
    drawn = colour_shapes.draw(folder / "drawn", seed=5) / "images"
    photos = folder / "photos"
    photos.mkdir()
    truth = {}
    for number in range(IMAGES):
        name = CLASSES[number % len(CLASSES)]
        truth[f"IMG_{number:04d}.png"] = name
        shutil.copy(drawn / name / f"train-{number // len(CLASSES):03d}.png", photos / f"IMG_{number:04d}.png")
    (photos / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return truth


def test_a_newcomer_labels_three_rounds_and_predict_uses_what_was_learned(tmp_path: Path) -> None:
    truth = save_photos(tmp_path)
    port = free_port()
    own = ["data.root=photos", "model.path=data_prep/nano/checkpoints/clip", "tracking.enabled=false"]
    command = [
        "run",
        "label_folder",
        "--label",
        "--port",
        str(port),
        *(part for text in own for part in ("--set", text)),
    ]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said, chromium(*DESKTOP) as page:
        started = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command], cwd=tmp_path, env=env, stdout=said, stderr=said, text=True
        )
        try:
            for number in range(1, ROUNDS + 1):
                if number == 1:
                    until(lambda: "labelling page:" in (tmp_path / "said").read_text(), 240)
                    found = re.search(r"labelling page: (\S+)", (tmp_path / "said").read_text())
                    assert found is not None
                    page.open(found[1])
                title = f"Round {number} of {ROUNDS}"
                until(lambda t=title: page.script("document.querySelector('#title').textContent") == t, 240)  # type: ignore[misc]
                for place in range(PER_ROUND):
                    image = shown(page).partition(". ")[2]
                    press(page, str(CLASSES.index(truth[image]) + 1))
                    count = f"{place + 1} of {PER_ROUND} labelled"
                    until(lambda c=count: page.script("document.querySelector('#count').textContent") == c)  # type: ignore[misc]
                page.script("document.querySelector('#done').click()")
            assert started.wait(240) == EXIT_OK, (tmp_path / "said").read_text()[-3000:]
        finally:
            started.kill()
    run = tmp_path / "runs" / "label_folder"
    rounds = sorted((run / "units" / "coop-photos-s1" / "rounds").glob("*/selection.json"))
    chosen = [json.loads(file.read_text()) for file in rounds]
    asked = [image for selection in chosen for image in selection["images"]]
    assert len(set(asked)) == ROUNDS * PER_ROUND
    labels = [label for selection in chosen for label in selection["labels"]]
    assert labels == [CLASSES.index(truth[image]) for image in asked]
    drawn = tmp_path / "drawn" / "colour_shapes" / "images"
    files = {drawn / name / f"test-{number:03d}.png": name for name in CLASSES for number in range(HELD_OUT)}
    right = [classify(run, file)["answer"] == name for file, name in files.items()]
    assert sum(right) >= 0.75 * len(right)  # by chance a quarter
