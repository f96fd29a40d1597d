"""The routing probe: its tasks resemble each other and can be told apart, and routers are measured side by side."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_prep.nano import CHECKPOINTS
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.bench.__main__ import app
from pipeline.bench.data_source import write_prepared
from pipeline.bench.routing.ceiling import ceiling
from pipeline.bench.routing.pictures import Cut, attributes_of, draw_pool
from pipeline.bench.routing.prepared import prepared_keys
from pipeline.bench.routing.probe import Amounts, TaskKeys, probe_keys
from pipeline.bench.routing.quality import auroc, calibration_error, own_ranks, rejected
from pipeline.bench.routing.tasks import FEW, HARD, MANY, MOST, grid, probe_tasks
from pipeline.data.shards import IDENTITY_FIELDS
from pipeline.errors import UserError

SMALL = Amounts(120, 12, test_pictures=60)
IDENTITY = dict.fromkeys(IDENTITY_FIELDS, "generated")


def bench(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["routing", *options])
    return done.exit_code, done.output


def test_every_task_of_the_probe_has_a_twin_with_one_difference() -> None:
    by_name = {task.name: task for task in HARD}
    assert len(by_name) == len(HARD) == 40
    for task in HARD:
        assert task.twin is not None and task.differs, task.name
        twin = by_name[task.twin]
        assert (task.topic == twin.topic) != (task.pictures == twin.pictures), task.name
    assert {task.train for task in HARD} >= {FEW, MANY}
    assert any(task.pictures is None for task in HARD) and any(task.without for task in HARD)


def test_no_topic_stands_for_one_task_alone_unless_its_pictures_do_too() -> None:
    pictures = Counter(task.pictures.family for task in HARD if task.pictures is not None)
    assert min(pictures.values()) >= 2
    shared = Counter(task.topic for task in HARD)
    assert sum(shared[task.topic] > 1 for task in HARD) >= 20  # of these the wording says nothing


@pytest.mark.parametrize("count", [2, 8, 39, 64, 256, 1024, MOST])
def test_a_probe_of_any_size_has_no_two_tasks_of_the_same_keys(count: int) -> None:
    tasks = probe_tasks(count)
    assert len(tasks) == len({task.name for task in tasks}) == count
    kinds = set()
    for task in tasks:
        cut = None if task.pictures is None else (task.pictures.family, tuple(task.pictures.where.items()))
        kinds.add((task.topic, cut))
    assert len(kinds) == count


def test_a_grid_has_tasks_with_the_same_pictures_and_with_the_same_question() -> None:
    tasks = grid(256)
    topics = Counter(task.topic for task in tasks)
    assert set(topics.values()) == {16} and len(topics) == 16
    assert {task.train for task in tasks} >= {FEW, 256}


def test_pictures_are_cut_by_what_is_drawn() -> None:
    pool = draw_pool("digit", "test", 40, seed=1)
    low = pool.rows(Cut("digit", {"digit": (0, 1, 2, 3, 4), "background": ("dark",)}))
    assert 0 < len(low) < 40
    for row in low.tolist():
        scene = pool.scenes[row]
        assert scene.digit is not None and scene.digit < 5 and scene.image[0, 0].max() < 128
    for family in ("shapes", "text", "chart"):
        backgrounds = Counter(attributes_of(scene)["background"] for scene in draw_pool(family, "train", 60, 0).scenes)
        assert min(backgrounds["dark"], backgrounds["light"]) > 15


@pytest.fixture(scope="module")
def few() -> list[TaskKeys]:
    return probe_keys(probe_tasks(8), SMALL, seed=3)


def test_keys_are_a_function_of_the_seed_and_those_of_the_clip(few: list[TaskKeys]) -> None:
    again, other = probe_keys(probe_tasks(8), SMALL, seed=3), probe_keys(probe_tasks(8), SMALL, seed=4)
    for first, second, third in zip(few, again, other, strict=True):
        assert first.train.image.equal(second.train.image) and first.test.text.equal(second.test.text)
        assert not first.test.text.equal(third.test.text)
    clip = CHECKPOINTS / "clip"
    assert few[0].train.identity == key_identity(clip)
    scene = draw_pool("shapes", "train", 1, seed=3).scenes[0]
    from PIL import Image

    key = KeyEncoder(clip, device="cpu").image([Image.fromarray(scene.image)]).half()
    pictured = torch.cat([task.train.image for task in few])
    assert (pictured.float() - key.float()).abs().amax(1).min() < 1e-3


def test_training_and_test_pictures_are_disjoint(few: list[TaskKeys]) -> None:
    for task in few:
        train, test = (keys.image[keys.has_image] for keys in (task.train, task.test))
        assert not any((train == row).all(1).any() for row in test)


def test_a_classifier_on_plenty_of_keys_tells_twins_apart() -> None:
    pairs = [task for task in HARD if task.name.startswith(("print-", "chart-"))]
    keys = probe_keys(pairs, Amounts(800, 50, test_pictures=100), seed=0)
    assert len(keys) == 4 and ceiling(keys, epochs=10).min() > 0.9
    same = [TaskKeys(name, keys[0].train, keys[0].test) for name in ("one", "another")]
    assert ceiling(same, epochs=2).mean() < 0.7  # it cannot tell what is the same


def test_ranks_count_the_tasks_that_score_better() -> None:
    scores = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.3, 0.2], [0.2, 0.2, 0.2]])
    assert own_ranks(scores, 0).tolist() == [1, 3, 1]
    assert own_ranks(scores, torch.tensor([2, 1, 2])).tolist() == [3, 1, 3]


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    right = torch.tensor([True, True, True, False])
    assert calibration_error(torch.full((4,), 0.75), right, torch.ones(4)) == pytest.approx(0.0)
    assert calibration_error(torch.full((4,), 0.95), right, torch.ones(4)) == pytest.approx(0.2)
    assert calibration_error(torch.full((4,), 0.95), right, torch.tensor([0.0, 0, 0, 1])) == pytest.approx(0.95)


def test_foreign_samples_are_counted_against_own_ones() -> None:
    own = torch.arange(100.0)
    assert auroc(torch.full((5,), 200.0), own) == 1.0
    assert auroc(own, own) == 0.5
    assert auroc(torch.full((5,), -1.0), own) == 0.0
    assert rejected(torch.tensor([98.5, 98.0, 50.0, 60.0]), own) == 0.25


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [tmp_path_factory.mktemp(name) / "data" for name in ("first", "second")]
    write_prepared(made[0], {"ScienceQA": (40, 10), "GQA": (40, 10)}, IDENTITY, width=8)
    write_prepared(made[1], {"GQA": (40, 10)}, IDENTITY, width=8)
    return made


def test_the_command_ends_with_one_line_of_json() -> None:
    code, output = bench("--tasks", "8", "--samples", "40", "--pictures", "300", "--left-out", "2", "--json")
    assert code == 0, output
    found = json.loads(output.strip().splitlines()[-1])
    assert found["tasks"] == 8 and found["default"] in found["routers"]
    assert found["routers"].keys() >= {"mean", "centres", "ridge", "random_ridge"}
    for row in found["routers"].values():
        assert 0 <= row["worst"] <= row["first"] <= row["within_k"] <= 100
        assert row["bytes_per_task"] > 0 and row["seconds"] > 0
        assert row["lost"] == pytest.approx(100 - row["first"], abs=1e-2)
        assert len(row["tasks"]) == 8 and len(row["left_out"]["tasks"]) == 2
        assert 0 <= row["calibration_error"] <= 100 and 0 <= row["left_out"]["auroc"] <= 100
    assert found["routers"]["random_ridge"]["lost"] < found["routers"]["mean"]["lost"] / 2


def test_the_table_is_for_people(folders: list[Path]) -> None:
    chosen = ["--routers", "mean", "{name: mean, image_weight: 0.2}", "--left-out", "1"]
    code, output = bench("--prepared", *map(str, folders), *chosen)
    assert code == 0, output
    assert "first right" in output and "image_weight: 0.2" in output and "AUROC" in output


def test_prepared_folders_are_one_sequence_whose_equal_names_are_told_apart(folders: list[Path]) -> None:
    names = [task.name for task in prepared_keys(folders)]
    assert len(set(names)) == 3 and "ScienceQA" in names
    assert [name for name in names if name.endswith("/GQA")] == [f"{folders[n].parent.name}/data/GQA" for n in (0, 1)]
    code, output = bench("--prepared", *map(str, folders), "--routers", "mean", "--json")
    assert code == 0, output
    found = json.loads(output.strip().splitlines()[-1])
    assert found["tasks"] == 3 and found["samples"]["test"]["all"] == 30


def _message(options: list[str]) -> str:
    code, output = bench(*options)
    assert code == 2, output
    return " ".join(output.split())


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--tasks", "1"], "expected 2 to"),
        (["--tasks", str(MOST + 1)], f"expected 2 to {MOST}"),
        (["--routers", "meen"], "Did you mean 'mean'"),
        (["--routers", "prototype"], "learned with a stage's module"),
        (["--routers", "{name: mean, weight: 1}"], "has no option 'weight'"),
        (["--routers", "{name: mean, image_weight: 3}"], "image_weight"),
        (["--routers", "{mean"], "is no router"),
        (["--routers", "mean", "mean"], "named twice"),
        (["--prepared", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_bad_input_is_said_in_a_sentence(options: list[str], expected: str) -> None:
    assert expected in _message(options)


def test_a_folder_that_is_not_prepared_is_said_with_the_one_that_is(folders: list[Path], tmp_path: Path) -> None:
    assert "holds no prepared tasks" in _message(["--prepared", str(tmp_path)])
    assert "Did you mean" in _message(["--prepared", str(folders[0] / "GQA")])
    assert "Did you mean" in _message(["--prepared", str(folders[0].parent)])
    assert "named twice" in _message(["--prepared", str(folders[0]), str(folders[0])])
    assert "at least two" in _message(["--prepared", str(folders[1])])
    assert "--ceiling" in _message(["--prepared", *map(str, folders), "--ceiling"])


def test_keys_of_different_clips_are_refused(folders: list[Path], tmp_path: Path) -> None:
    write_prepared(tmp_path, {"VQAv2": (40, 10)}, {**IDENTITY, "weights_sha256": "another"}, width=8)
    with pytest.raises(UserError, match="come from another CLIP"):
        prepared_keys([folders[1], tmp_path])
