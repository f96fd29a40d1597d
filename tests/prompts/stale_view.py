"""Evaluates a task whose answers are all there, on ranks of which only the first sees the files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.files.atomic import write_json
from pipeline.prompts.parts.base import Entry
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import close_world, init_world
from pipeline.sequence.answers import SETS_FILE, AnswerStore, Routed
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.test_set import TestSet
from tests.training.worlds import make_pool, make_samples

SAMPLES = 3


def main(folder: Path) -> None:
    """Rank 0 finds the answers in `folder`, every other rank looks into a folder of its own with nothing in it."""
    world = init_world()
    samples, keys = make_samples(SAMPLES)
    test = TestSet("a", "exact", 8, StageData([(samples, keys, None)]))
    pool = make_pool(1)
    nothing: Any = None

    def score(place: Path, earlier: list[Path]) -> float:
        chosen, scores = Selection.same(SAMPLES, [0]), torch.zeros(SAMPLES, 1)
        store, answering = AnswerStore(place, earlier), Answering(lambda: nothing, 4, Entry())
        return evaluate_task(test, pool, lambda: Routed(chosen, scores), store, answering, world)

    if world.main:
        write_json(folder / "before" / SETS_FILE, {pool.names[0]: pool.fingerprint(0)})
        lines = [f'{{"id": "s{n}", "prediction": "red", "selected": ["{pool.names[0]}"]}}\n' for n in range(SAMPLES)]
        (folder / "before" / "a.jsonl").write_text("".join(lines))
    scored = score(folder / "now", [folder / "before" if world.main else folder / "stale"])
    (folder / f"{world.rank}.score").write_text(str(scored))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(Path(sys.argv[1])))
