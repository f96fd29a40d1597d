"""A task of lmms-eval scores an adapter by its own command line; what cannot be scored is refused with a sentence.

`make test-lmms` installs lmms-eval beside the tests' environment; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.adapter.answering import Question
from pipeline.adapter.load import load_adapter
from pipeline.config.paths import PROJECT
from tests.adapters import question, save_adapter, save_models

PROGRAM = Path(os.environ.get("LMMS_PYTHON", PROJECT / ".venv-lmms" / "bin" / "python"))
pytestmark = [
    pytest.mark.lmms,
    pytest.mark.e2e,
    pytest.mark.skipif(not PROGRAM.is_file(), reason="lmms-eval is not installed; `make test-lmms` installs it"),
]

LONGEST = 4
ASKED = [question(number, variant, with_image=variant != 1) for number in range(3) for variant in range(3)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    return save_adapter(folder / "adapter", save_models(folder / "models"), k=1)


@pytest.fixture(scope="module")
def answers(adapter: Path) -> list[str]:
    """What the adapter answers here."""
    return [answer.text for answer in load_adapter(adapter).answer(ASKED, LONGEST)]


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the path in which this project is installed as far as its entry points go."""
    toml = pytest.importorskip("tomllib")  # of Python 3.11
    project = toml.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    folder = tmp_path_factory.mktemp("plugins")
    information = folder / "continual_prompts-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: continual-prompts\nVersion: 0\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{n} = {t}" for n, t in points.items()))]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_task(folder: Path, asked: list[Question], answers: list[str], **changes: Any) -> Path:
    """A task of lmms-eval over these questions, in a folder for --include_path."""
    folder.mkdir()
    rows = [
        {
            "image": None if one.image is None else {"bytes": one.image, "path": None},
            "question": one.text,
            "answer": answer,
            "twice": bool(changes.get("twice")),
        }
        for one, answer in zip(asked, answers, strict=True)
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = [("image", image), ("question", pa.string()), ("answer", pa.string()), ("twice", pa.bool_())]
    features = {"image": {"_type": "Image"}, "twice": {"dtype": "bool", "_type": "Value"}} | {
        name: {"dtype": "string", "_type": "Value"} for name in ("question", "answer")
    }
    features = {name: features[name] for name, _ in kinds}
    described = pa.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.Table.from_pylist(rows, schema=described), folder / "test.parquet")
    (folder / "shapes.py").write_text((PROJECT / "tests" / "lmms" / "task" / "shapes.py").read_text("utf-8"))
    settings = {
        "task": "shapes",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": changes.get("output_type", "generate_until"),
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n"], "max_new_tokens": LONGEST, **changes.get("generation_kwargs", {})},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }
    functions = {"doc_to_visual": "picture_of", "doc_to_text": "question_of", "process_results": "scored"}
    tagged = "".join(f"{name}: !function shapes.{function}\n" for name, function in functions.items())
    (folder / "shapes.yaml").write_text(yaml.safe_dump(settings) + tagged)
    return folder


def evaluated(task: Path, plugins: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(PROGRAM), "-m", "lmms_eval", "--model", "continual_prompts", "--model_args", arguments, "--tasks", "shapes",
        "--include_path", str(task), "--device", "cpu", "--output_path", str(task / "out"), "--log_samples",
        "--verbosity", "WARNING",
    ]  # fmt: skip
    path = os.pathsep.join([str(PROJECT), str(plugins)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(task / "cache"), "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, cwd=task, env=environment, capture_output=True, text=True, timeout=600)


def results(task: Path) -> dict[str, Any]:
    (path,) = (task / "out").rglob("*results.json")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))["results"]["shapes"]
    return found


def samples(task: Path) -> list[str]:
    """The answers that lmms-eval has logged, in the order of the documents."""
    (path,) = (task / "out").rglob("*samples_shapes.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


def test_a_task_scores_what_the_adapter_answers(
    adapter: Path, answers: list[str], plugins: Path, tmp_path: Path
) -> None:
    expected = [*answers[:-2], "something else", "another thing"]  # two of nine are wrong
    task = write_task(tmp_path / "task", ASKED, expected)
    done = evaluated(task, plugins, f"adapter={adapter}")
    assert (task / "out").is_dir(), (done.stdout + done.stderr)[-3000:]
    assert samples(task) == answers
    assert results(task)["right,none"] == pytest.approx(sum(map(str.__eq__, expected, answers)) / len(ASKED))


def test_an_answer_ends_before_a_stop_text(adapter: Path, answers: list[str], plugins: Path, tmp_path: Path) -> None:
    stop = next(answer for answer in answers if len(answer) > 1)[1]
    task = write_task(tmp_path / "task", ASKED, answers, generation_kwargs={"until": [stop]})
    done = evaluated(task, plugins, f"adapter={adapter}")
    assert (task / "out").is_dir(), (done.stdout + done.stderr)[-3000:]
    assert samples(task) == [answer.partition(stop)[0] for answer in answers]


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"twice": True}, "", "has 2 pictures; expected at most one, as the models answer about one"),
        ({"generation_kwargs": {"do_sample": True}}, "", "sets do_sample=True, and answers here are greedy"),
        ({}, ",adaptor=x", "--model_args has 'adaptor'; expected adapter, frozen, clip, task, unfamiliar"),
        ({}, ",unfamiliar=maybe", "--model_args has unfamiliar=maybe; expected answer"),
        ({}, ",task=T9", "unknown task 'T9'; expected one of T0, T1, T2"),
        ({"output_type": "loglikelihood"}, "", "This task compares likelihoods of given answers"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    adapter: Path, answers: list[str], plugins: Path, tmp_path: Path, changes: Any, arguments: str, sentence: str
) -> None:
    task = write_task(tmp_path / "task", ASKED, answers, **changes)
    done = evaluated(task, plugins, f"adapter={adapter}{arguments}")
    # lmms-eval 0.7.3 logs an error and exits with 0.
    assert sentence in " ".join((done.stdout + done.stderr).split())
    assert not list((task / "out").rglob("*results.json"))
