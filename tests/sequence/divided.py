"""Answers questions with a model on two ranks, and with a whole one; run as a script by the tests."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.sharded import Place, held_bytes
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import Interrupted
from pipeline.prompts.embedding import embed_with_rows
from pipeline.prompts.generation import Conditions
from pipeline.prompts.parts.base import Entry
from pipeline.prompts.parts.input_rows import PROMPT, RowsEntry
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import Routed
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import World, close_world, gather_objects, init_world, neighbours
from pipeline.sequence.answers import AnswerStore
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.test_set import TestSet
from pipeline.training.operations import OperationCount
from tests.backbones.test_deep_families import CHOSEN, entered
from tests.backbones.test_families import NEW, SAMPLES
from tests.backbones.test_low_rank_families import ALPHA, RANK, targets_of
from tests.training.worlds import make_samples

BATCH = 4
STOPPED = "low rank"  # the modules with which an evaluation is also stopped after a batch, and resumed


def modules(lmm: LMM) -> Iterator[tuple[str, Entry, dict[str, Tensor], bool]]:
    """Kinds of modules by name, three random ones of each, and whether images are shared."""
    generator = torch.Generator().manual_seed(5)
    rows = {PROMPT: torch.randn(3, 4, lmm.width, generator=generator) * 0.3}
    yield "none", RowsEntry("after_bos"), {}, False
    yield "rows", RowsEntry("after_bos"), rows, False
    yield "rows, shared images", RowsEntry("after_bos"), rows, True
    yield "rows behind the image", RowsEntry("after_image"), rows, False
    for name in ("grown", "prefix"):
        entry, _, tensors = entered(lmm, name)
        yield name, entry, tensors, False
    shapes = {name: value.shape for name, value in LowRank(lmm, targets_of(lmm), RANK, ALPHA).trainables().items()}
    low = {name: torch.randn(3, *shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    yield "low rank", LowRankEntry(ALPHA / RANK), low, False


class Asked:
    """Evaluates the samples with one of two models, and counts the batches that this rank answers."""

    def __init__(self, world: World, entry: Entry, tensors: dict[str, Tensor], share: bool) -> None:
        self.world, self.entry, self.share, self.batches = world, entry, share, 0
        self.pool, count = PromptPool(), len(next(iter(tensors.values()), ()))
        for number in range(count):
            self.pool.append(f"t{number}", {name: value[number] for name, value in tensors.items()}, {})
        chosen = CHOSEN if count else Selection.none(len(SAMPLES))
        self.routed = Routed(chosen, torch.zeros(len(SAMPLES), count))
        self.test = TestSet("a", "exact", NEW, StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]))

    def evaluate(self, lmm: LMM, folder: Path, count: OperationCount | None = None, batches: int = 99) -> None:
        """Leave the predictions in the folder, or the answers of the first batches."""
        left = iter(range(batches))
        conditions = Conditions(go_on=lambda: next(left, None) is not None, progress=self._progress, count=count)
        # Both ranks answer all questions, with the whole model too.
        answering = Answering(lambda: lmm, BATCH, self.entry, self.share, conditions, self.world.size)
        evaluate_task(self.test, self.pool, lambda: self.routed, AnswerStore(folder), answering, self.world)

    def _progress(self) -> None:
        self.batches += 1  # once per sample and once per batch


def cached(lmm: LMM) -> int:
    """Bytes of keys and values after the first token of three answers without modules."""
    examples = Examples(StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]), lmm.conversation)
    batch = collate_prompts(examples, [0, 1, 2], Selection.none(len(SAMPLES)))
    with torch.no_grad():
        found = embed_with_rows(lmm, batch, None, "after_bos")
        decoder = GreedyDecoder[Row](lmm)
        decoder.join(
            Prompts(found.vectors, found.attention, found.places, batch.images),
            [Row(number, NEW, shortest=NEW) for number in range(3)],
        )
        return decoder.nbytes


def main(job_file: str) -> None:
    """Do a job {"models": {kind: folder}, "out"}; predictions lie in OUT/KIND/MODULES/whole and divided.

    A kind whose name ends in " alone" is answered with without modules only.
    """
    job = json.loads(Path(job_file).read_text())
    world = init_world()
    place = Place(world.rank, world.size, neighbours(world, world.size))
    results: dict[str, Any] = {}
    for kind, folder in job["models"].items():
        config = ModelConfig(path=folder, max_length=512)
        whole, divided = load_lmm(config), load_lmm(config, device=world.device, place=place)
        buffers = dict(whole.model.named_buffers())
        same = all(torch.equal(value, buffers[name]) for name, value in divided.model.named_buffers())
        results[kind] = {
            "buffers": gather_objects(same),
            "whole": held_bytes(whole.model),
            "held": gather_objects(held_bytes(divided.model)),
            "cached whole": cached(whole),
            "cached": gather_objects(cached(divided)),
        }
        for name, entry, tensors, share in modules(whole):
            if kind.endswith(" alone") and name != "none":
                break
            if (share or entry.insertion == "after_image") and whole.family.needs_one_pass():
                continue
            asked, out = Asked(world, entry, tensors, share), Path(job["out"]) / kind / name
            counts = OperationCount(), OperationCount()
            asked.evaluate(whole, out / "whole", counts[0])
            asked.batches = 0
            asked.evaluate(divided, out / "divided", counts[1])
            operations = gather_objects((counts[0].per_sample, counts[1].per_sample))
            results[kind][name] = {"operations": operations, "asked": asked.batches}
            if name == STOPPED:
                with contextlib.suppress(Interrupted):
                    asked.evaluate(divided, out / "stopped", batches=1)
                    raise AssertionError("the evaluation was not stopped")
                asked.batches = 0
                asked.evaluate(divided, out / "stopped")
                results[kind][name]["asked again"] = asked.batches
    if world.main:
        (Path(job["out"]) / "results.json").write_text(json.dumps(results))
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
