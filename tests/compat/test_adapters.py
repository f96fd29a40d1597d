"""Kept adapters and a kept model of MLflow's registry load and answer as the runs did that they come from."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter import load_adapter
from pipeline.answering import Question
from tests.compat.kept import KEPT, TENSORS, succeeded

pytestmark = pytest.mark.usefixtures("working")


def asked(run: str) -> list[dict[str, Any]]:
    """The test samples with what the finished run answered, and their pictures."""
    found = [json.loads(line) for line in (KEPT / "finished" / run / "answers.jsonl").open(encoding="utf-8")]
    for sample in found:
        with tarfile.open(f"data/sequence/{sample['task']}/test/shard-000000.tar") as shard:
            name = f"{int(sample['id']):08d}.png"
            content = shard.extractfile(name) if name in shard.getnames() else None
            sample["image"] = content.read() if content is not None else None
    return found


@pytest.mark.parametrize("run", ["sequence", "projector"])
def test_an_adapter_answers_as_the_run_was_evaluated(run: str) -> None:
    samples = asked(run)
    answers = load_adapter(Path("adapters") / run).answer([Question(s["question"], s["image"]) for s in samples])
    assert [answer.text for answer in answers] == [sample["prediction"] for sample in samples]
    assert [answer.selected for answer in answers] == [sample["selected"] for sample in samples]
    for answer, sample in zip(answers, samples, strict=True):
        assert list(answer.similarity.values()) == pytest.approx(sample["similarity"], abs=1e-4)  # answers round them


def test_an_adapter_is_pruned_and_merged_again() -> None:
    succeeded("prune", "adapters/sequence", "T0", "T2", "--into", "second")
    succeeded("prune", "adapters/sequence", "T1", "--into", "others")
    succeeded("merge", "others", "second", "--into", "merged")
    before, after = (load_file(Path(folder) / TENSORS) for folder in ("adapters/sequence", "merged"))
    assert torch.equal(after["prompts"], before["prompts"][[0, 2, 1]])
    assert torch.equal(after["prototypes"], before["prototypes"][[0, 2, 1]])


def test_a_registered_model_loads_and_answers_as_its_run() -> None:
    import pandas
    from mlflow import pyfunc

    model = pyfunc.load_model(str(KEPT / "registered"))
    samples = asked("sequence")
    frame = pandas.DataFrame([{"question": sample["question"], "image": sample["image"]} for sample in samples])
    found = model.predict(frame)
    assert list(found["answer"]) == [sample["prediction"] for sample in samples]
    assert list(found["selected"]) == [", ".join(sample["selected"]) for sample in samples]
