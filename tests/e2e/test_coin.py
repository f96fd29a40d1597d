"""CoIN from its folder to the accuracy matrix: all eight tasks in the true layout, on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.shards import IndexedShards
from pipeline.sequence.run import run_sequence
from tests.tiny import save_llava
from tests.tiny_clip import picture, save_clip

pytestmark = pytest.mark.e2e

TRAIN, TEST = 4, 3
LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
# Of every task: its test file, the folder of its images, a question, the answer to training sample n.
TASKS: dict[str, tuple[str, str, str, Callable[[int], str]]] = {
    "ScienceQA": ("test", "ScienceQA/test", f"Which is a metal?\nA. wood\nB. iron{LETTER}", lambda n: "AB"[n % 2]),
    "TextVQA": ("val", "TextVQA/train_images", f"what does the sign say?{SHORT}", lambda n: f"exit {n}"),
    "ImageNet": ("test", "ImageNet/train/n01", f"What is the object in the image?{SHORT}", lambda n: f"cat {n}"),
    "GQA": ("test", "GQA/images", f"Is it overcast?{SHORT}", lambda n: "yes" if n % 2 else "no"),
    "VizWiz": ("val", "VizWiz/train", f"What is this?{SHORT}", lambda n: "unanswerable"),
    "Grounding": (
        "test",
        "COCO2014/train2014",
        "Please provide the bounding box coordinate of the region this sentence describes: a dog.",
        lambda n: f"[0.1{n},0.20,0.50,0.60]",
    ),
    "VQAv2": ("val", "COCO2014/val2014", f"What color is it?{SHORT}", lambda n: "red"),
    "OCRVQA": ("test", "OCR-VQA/images", f"Who wrote this book?{SHORT}", lambda n: f"Author {n}"),
}


def write_coin(root: Path) -> None:
    """Eight tasks as the benchmark has them: image paths below datasets/, ids as texts and numbers, text-only
    ScienceQA questions, a conversation of two turns, TextVQA's ten answers in a file of their own."""
    for task, (test, folder, question, answer) in TASKS.items():
        instructions, images = root / "instructions" / task, root / "datasets" / folder
        for directory in (instructions, images):
            directory.mkdir(parents=True, exist_ok=True)
        train: list[dict[str, Any]] = []
        for n in range(TRAIN):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer(n)}]
            train.append({"id": f"{task}_{n}", "image": _image(images, folder, f"{task}{n}"), "conversations": turns})
        tests: list[dict[str, Any]] = []
        for n in range(TEST):
            entry = {"question_id": n, "image": _image(images, folder, f"{task}t{n}"), "text": question}
            tests.append({**entry, "answer": answer(n)})
        if task == "ScienceQA":
            for entries in (train, tests):
                del entries[1]["image"]
            train[1]["conversations"][0]["value"] = question
        if task == "Grounding":
            tests = [{**entry, "answer_bbox": entry["answer"], "size": [20, 12]} for entry in tests]
        if task == "GQA":
            train[0]["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "no"}]
        if task == "TextVQA":
            known = [{"question_id": n, "answers": [answer(n)] * 8 + ["stop"] * 2} for n in range(TEST)]
            (instructions / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": known}))
        (instructions / "train.json").write_text(json.dumps(train))
        (instructions / f"{test}.json").write_text(json.dumps(tests))


def _image(folder: Path, path: str, name: str) -> str:
    (folder / f"{name}.jpg").write_bytes(picture(sum(name.encode()), size=(20, 12), kind="JPEG"))
    return f"./{path}/{name}.jpg"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coin")
    write_coin(folder / "CoIN")
    save_llava(folder / "llava")
    save_clip(folder / "clip")
    return folder


def recipe(project: Path, name: str = "coin_llava15_7b", *overrides: str) -> Recipe:
    """The shipped recipe with the user's paths, and sizes for a test of seconds."""
    return load_recipe(
        name,
        [
            f"data.root={project / 'CoIN'}",
            f"model.path={project / 'llava'}",
            f"keys.path={project / 'clip'}",
            f"data.prepared={project / name}",
            f"run_dir={project / 'runs' / name}",
            "data.workers=1",
            "model.dtype=float32",
            "train.steps=1",
            "train.global_batch=2",
            "train.micro_batch=2",
            "train.workers=0",
            "train.deepspeed=ds_configs/zero0.json",
            "tracking.enabled=false",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def prepared(project: Path) -> Recipe:
    built = recipe(project, "coin_llava15_7b", *(f"data.tasks.{n}.max_new_tokens=4" for n in range(len(TASKS))))
    prepare(built, progress=False)
    return built


def test_every_task_is_prepared_from_the_layout_of_the_benchmark(prepared: Recipe) -> None:
    for task in TASKS:
        splits = {split: IndexedShards(prepared.data.split_path(task, split)) for split in ("train", "test")}
        assert [len(splits["train"]), len(splits["test"])] == [TRAIN, TEST]
        pictures = [sample.image is not None for sample in splits["test"]]
        assert pictures == ([True, False, True] if task == "ScienceQA" else [True] * TEST)
    textvqa = IndexedShards(prepared.data.split_path("TextVQA", "test"))[0]
    assert textvqa.meta["answers"] == ["exit 0"] * 8 + ["stop"] * 2
    gqa = IndexedShards(prepared.data.split_path("GQA", "train"))[0]
    assert gqa.meta["turns"] == [{"question": "And now?", "answer": "no"}]


def test_all_eight_tasks_train_and_score(prepared: Recipe) -> None:
    result = run_sequence(prepared)
    assert result["tasks"] == list(TASKS)
    for stage, row in enumerate(result["accuracy"]):
        known = [score for score in row if score is not None]
        assert len(known) == stage + 1
        assert all(math.isfinite(score) and 0 <= score <= 100 for score in known)
    assert all(math.isfinite(score) for score in result["zero_shot"])
    summaries = prepared.run_path / "eval" / "after-08"
    for task in prepared.data.tasks:
        summary = json.loads((summaries / f"{task.name}.score.json").read_text())
        assert (summary["metric"], summary["scoring"], summary["samples"]) == (task.metric, "fixed", TEST)
        assert set(summary["parts"]) == ({"image", "text"} if task.name == "ScienceQA" else set())


def test_the_true_answers_score_full_marks_in_every_task(prepared: Recipe) -> None:
    from pipeline.metrics.scoring import Answered, score_task

    for task in prepared.data.tasks:
        samples = list(IndexedShards(prepared.data.split_path(task.name, "test")))
        for scoring in ("fixed", "compat"):
            right = [Answered(sample.answer, sample.answer, sample.meta) for sample in samples]
            wrong = [Answered("~", sample.answer, sample.meta) for sample in samples]
            assert score_task(task.metric, right, scoring).percent == 100.0, (task.name, scoring)
            assert score_task(task.metric, wrong, scoring).percent == 0.0, (task.name, scoring)


def test_bad_records_are_left_out_and_listed_in_the_run(project: Path) -> None:
    images = project / "CoIN" / "datasets" / "VizWiz" / "train"
    (images / "VizWiz1.jpg").rename(images / "moved.jpg")
    try:
        built = recipe(
            project,
            "coin_llava15_7b_compat",
            "data.tasks=[{name: VizWiz, metric: vizwiz, max_new_tokens: 4}]",
            "data.skip_bad=1",
        )
        assert len(prepare(built, progress=False)["skipped"]) == 1
        run_sequence(built)
    finally:
        (images / "moved.jpg").rename(images / "VizWiz1.jpg")
    (record,) = json.loads((built.run_path / "run.json").read_text())["skipped"]
    assert (record["record"], Path(record["file"]).name) == ("entry 1 (id 'VizWiz_1')", "train.json")
    assert "VizWiz1.jpg does not exist" in record["reason"]
    summary = json.loads((built.run_path / "eval" / "after-01" / "VizWiz.score.json").read_text())
    assert summary["scoring"] == "compat"


def test_a_captioning_task_is_scored_as_a_whole(project: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    root = project / "UCIT"
    (root / "instructions" / "Flickr30k-cap").mkdir(parents=True)
    (root / "datasets").mkdir()
    train: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for n in range(TEST):
        name = _image(root / "datasets", ".", f"f{n}")
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"dog number {n}"}]
        train.append({"id": str(n), "image": name, "conversations": turns})
        tests.append({"question_id": str(n), "image": name, "text": "Describe it.", "answer": f"dog number {n}"})
        captions += [{"image_id": n, "caption": text} for text in (f"A dog, number {n}.", f"a {n} on a dog")]
    known = {"images": [{"id": n, "file_name": f"f{n}.jpg"} for n in range(TEST)], "annotations": captions}
    files = {"train_brief_4w": train, "test_3000": tests, "val_coco_type_3000": known}
    for name, content in files.items():
        (root / "instructions" / "Flickr30k-cap" / f"{name}.json").write_text(json.dumps(content))
    task = "data.tasks=[{name: Flickr30k-cap, metric: caption, max_new_tokens: 4}]"
    built = recipe(project, "ucit_llava15_7b", task, f"data.root={root}")
    prepare(built, progress=False)
    (score,) = run_sequence(built)["accuracy"][0]
    summary = json.loads((built.run_path / "eval" / "after-01" / "Flickr30k-cap.score.json").read_text())
    assert summary["score"] == score
    assert {"bleu_1", "bleu_4", "rouge_l", "cider"} <= set(summary["parts"])
    sample = IndexedShards(built.data.split_path("Flickr30k-cap", "test"))[0]
    assert sample.meta["answers"] == ["A dog, number 0.", "a 0 on a dog"]
