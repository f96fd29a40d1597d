"""`python -m data_prep.nano`: seconds of training already give checkpoints that load as any others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel
from typer.testing import CliRunner

from data_prep.nano import CHECKPOINTS
from data_prep.nano.__main__ import app
from data_prep.nano.example import write_example
from data_prep.nano.tasks import TASKS
from data_prep.own_task import NewTask, make_task
from pipeline.errors import EXIT_USER


def shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping


@pytest.mark.slow
def test_train_writes_the_two_checkpoints_with_their_processors(tmp_path: Path) -> None:
    moments = [f"--{part}-minutes=0.02" for part in ("vision", "key", "language")]
    done = CliRunner().invoke(app, ["train", f"--out={tmp_path}", "--scenes=160", "--threads=1", *moments])
    assert done.exit_code == 0, done.output
    assert "three sets" in done.output  # what it reached is measured at the end
    lmm = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=Image.new("RGB", (48, 48)), text=text, return_tensors="pt")
    assert lmm(**inputs).logits.isfinite().all()
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    words = AutoTokenizer.from_pretrained(tmp_path / "clip")("a red circle", return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "clip", backend="pil")(
        images=Image.new("RGB", (48, 48)), return_tensors="pt"
    )
    assert clip(**words, **pixels).logits_per_image.isfinite().all()
    for name in ("llava", "clip"):  # the same architecture as the ones that ship
        assert shapes(tmp_path / name) == shapes(CHECKPOINTS / name)


def test_example_writes_a_folder_of_pictures_and_a_table_that_become_a_task(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["example", str(tmp_path / "mine"), "--samples=40"])
    assert done.exit_code == 0, done.output
    pictures, table = tmp_path / "mine" / "photos", tmp_path / "mine" / "shelf.csv"
    with Image.open(pictures / "040.png") as picture:
        assert picture.size == (48, 48)
    made = make_task(NewTask("Shelf", tmp_path / "own"), pictures, table)
    assert (made["train"] + made["test"], made["pictures"], made["answers"]) == (40, 40, 5)
    again = CliRunner().invoke(app, ["example", str(tmp_path / "mine")])
    assert again.exit_code == EXIT_USER and "is there already; choose another folder" in again.stderr


def test_an_example_is_a_function_of_its_seed(tmp_path: Path) -> None:
    tables = [write_example(tmp_path / str(number), 12, seed) for number, seed in enumerate((0, 0, 1))]
    first, same, other = (table.read_bytes() for table in tables)
    assert first == same != other
    one, two = ((tmp_path / name / "photos" / "012.png").read_bytes() for name in "01")
    assert one == two


def test_tasks_writes_coin_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.nano import tasks

    monkeypatch.setattr(tasks, "TRAIN_SAMPLES", 4)
    monkeypatch.setattr(tasks, "TEST_SAMPLES", 2)
    done = CliRunner().invoke(app, ["tasks", str(tmp_path / "coin"), "--seed=3"])
    assert done.exit_code == 0, done.output
    for task in TASKS:
        entries = json.loads((tmp_path / "coin" / "instructions" / task / "train.json").read_text())
        assert len(entries) == 4 and (tmp_path / "coin" / entries[0]["image"]).is_file()
