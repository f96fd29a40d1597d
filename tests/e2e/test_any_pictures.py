"""Pictures as users have them, through models with the real processors' settings: no surprise after `check`."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest
from PIL import Image

from pipeline.check.sequence import check
from pipeline.config.recipe import Recipe
from pipeline.data import collate
from pipeline.errors import Interrupted
from pipeline.sequence.run import run_sequence
from tests import tiny_clip
from tests.backbones import tiny_families
from tests.backbones.real_processors import with_real_settings
from tests.e2e.conftest import recipe_on

LIMITS = {"qwen2_5_vl": 64, "internvl": 768}  # model.image_tokens
TINY, STRIP, ROTATED = (64, 64), (150, 1), (40, 90)


def picture(size: tuple[int, int], orientation: int = 1) -> bytes:
    """A picture of this upright size, stored as the orientation says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", size[::-1] if orientation in (5, 6, 7, 8) else size, (200, 30, 60))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def project(root: Path, kind: str, photographs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Two tasks whose pictures are of every form; the model's vision tower is as fine as the real one."""
    from data_prep.prepare import prepare

    monkeypatch.setattr(tiny_families, "SIDE", 448)
    monkeypatch.setattr(tiny_families, "PATCH", 14)
    with_real_settings(tiny_families.FAMILIES[kind](root / "llava"), kind)
    tiny_clip.save_clip(root / "clip")
    files = [picture(TINY), picture(STRIP), picture(ROTATED, 6), picture((2000, 250)), picture((300, 1))]
    files += [picture(size, 6 + 2 * (number % 2)) for number, size in enumerate(photographs)]
    (root / "coin" / "images").mkdir(parents=True)
    for number, file in enumerate(files):
        (root / "coin" / "images" / f"{number}.jpg").write_bytes(file)
    for task in ("T0", "T1"):
        folder = root / "coin" / "instructions" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            entries = [
                {
                    "id": f"{task}-{number}",
                    "image": f"images/{number}.jpg",
                    "conversations": [
                        {"from": "human", "value": f"<image>\nwhat is {number}?"},
                        {"from": "gpt", "value": "red"},
                    ],
                }
                for number in range(len(files))
            ]
            (folder / f"{split}.json").write_text(json.dumps(entries))
    recipe = recipe_on(root, root / "runs", 2, train__steps=3, train__global_batch=2, train__save_steps=1)
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"image_tokens": LIMITS[kind], "max_length": 900}),
            "data": recipe.data.model_copy(update={"too_long": "skip"}),
            "evaluate": recipe.evaluate.model_copy(update={"batch": 4, "zero_shot": False}),
        }
    )
    prepare(recipe, progress=False)
    return recipe


def goes_through(recipe: Recipe, kind: str, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not check(recipe, "any").problems
    make, batches = collate.collate, []

    def stopped_at_the_second(*args, **kwargs):
        batches.append(make(*args, **kwargs))
        if len(batches) == 2:
            signal.raise_signal(signal.SIGTERM)
        return batches[-1]

    monkeypatch.setattr(collate, "collate", stopped_at_the_second)
    with pytest.raises(Interrupted):
        run_sequence(recipe)
    monkeypatch.setattr(collate, "collate", make)
    result = run_sequence(recipe)
    told = json.loads((recipe.run_path / "run.json").read_text())
    assert told["status"] == "done" and [len(row) for row in result["accuracy"]] == [2, 2]
    # Qwen's processor refuses sides that differ more than 200 times; InternVL's takes every form.
    expected = {f"{task}/{split}": 1 for task in ("T0", "T1") for split in ("train", "test")}
    assert told["left_out"] == (expected if kind == "qwen2_5_vl" else {})
    lines = (recipe.run_path / "eval" / "after-02" / "T1.jsonl").read_text().splitlines()
    assert len(lines) == pictures


@pytest.mark.parametrize("kind", LIMITS)
def test_pictures_of_every_form_train_stop_resume_and_are_evaluated(tmp_path, kind, monkeypatch):
    recipe = project(tmp_path, kind, [(1200, 900)], monkeypatch)
    goes_through(recipe, kind, 6, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
def test_large_photographs_train_stop_resume_and_are_evaluated(tmp_path, kind, monkeypatch):
    recipe = project(tmp_path, kind, [(4032, 3024), (3024, 4032), (9248, 6944), (12000, 1500)], monkeypatch)
    goes_through(recipe, kind, 9, monkeypatch)
