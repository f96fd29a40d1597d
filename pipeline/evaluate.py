"""Evaluation: predictions on plain replicas, split over the ranks, and the accuracy matrix made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.checkpoint import write_json
from pipeline.data.collate import Examples, StageData, collate_prompts
from pipeline.distributed import World, barrier, gather_objects
from pipeline.files import replacing
from pipeline.prompts.insertion import gather_sets, insert_gaps, insert_prompts, insertion_place
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import NO_SET, similarity

SETS_FILE = "sets.json"  # beside the predictions: the fingerprint of every prompt set by name
PROJECTOR = "<projector>"  # and, where the projector is trained, its fingerprint under a name that no task can have


@dataclass(frozen=True)
class Test:
    """One task's test set."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    name: str
    metric: str
    max_new_tokens: int
    data: StageData
    scoring: str = "fixed"


@torch.no_grad()
def generate_answers(
    lmm: LMM,
    examples: Examples,
    indices: Sequence[int],
    selected: Tensor,
    sets: Tensor,
    max_new_tokens: int,
    batch: int,
    insertion: str = "after_bos",
) -> dict[int, str]:
    """Greedy answers of the samples `indices`, by index; `selected` [N, m] numbers of the sets [T, L, D] for all
    samples, which stand where `insertion` says (see `insertion_place`).

    Samples of similar length are generated together. The answers do not depend on how the samples are batched.
    """
    device = lmm.model.device
    bank = sets.to(device, lmm.dtype)
    lengths = {
        index: len(examples[index].prompt)
        + int((selected[index] != NO_SET).sum()) * (bank.shape[1] if len(bank) else 0)
        for index in indices
    }
    ordered = sorted(indices, key=lambda index: (-lengths[index], index))
    answers: dict[int, str] = {}
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        inputs = collate_prompts(examples, part, selected).to(device)
        embeddings, attention = lmm.embed(inputs.input_ids, inputs.images, inputs.has_image), inputs.attention
        places = lmm.image_places(inputs.input_ids)
        if inputs.selected.shape[1] and len(bank):
            vectors, valid = gather_sets(bank, inputs.selected)
            place = insertion_place(attention, lmm.image_beginnings(places), insertion)
            if lmm.family.reads_places:
                places = insert_gaps(places, attention, valid, place, left=True)
            embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, left=True, place=place)
            used = int(attention.sum(1).max())  # columns that are padding in every row
            embeddings, attention, places = embeddings[:, -used:], attention[:, -used:], places[:, -used:]
        generated = lmm.generate(embeddings, attention, max_new_tokens, places, inputs.images)
        for index, tokens in zip(part, generated, strict=True):
            answers[index] = examples.conversation.decode(tokens)
    return answers


def evaluate_task(
    lmm: Callable[[], LMM],
    test: Test,
    pool: PromptPool,
    selected: Tensor,
    scores: Tensor,
    world: World,
    folder: Path,
    batch: int,
    earlier: Iterable[Path] = (),
    insertion: str = "after_bos",
    projector: str = "",
) -> float:
    """Score a test set after a stage, write its predictions, and return its score in percent.

    `selected` [N, m] and `scores` [N, T] (similarities) belong to the samples of `test`. Answers that an evaluation
    in the `earlier` folders got with the same sets are taken from there (design.md decision 8). `lmm` is called only
    if something has to be generated. `projector` is the fingerprint of a trained image projector, an answer's third
    ingredient, "" where it is the base model's.
    """
    path = folder / f"{test.name}.jsonl"
    prints = {name: pool.fingerprint(index) for index, name in enumerate(pool.names)}
    chosen = [[pool.names[number] for number in row if number != NO_SET] for row in selected.tolist()]
    wanted = [(projector, *(prints[name] for name in row)) for row in chosen]
    known = _known_answers(test.name, [folder, *earlier])
    missing = [i for i, identity in enumerate(test.data.ids) if (identity, wanted[i]) not in known]
    answers: dict[int, str] = {}
    if missing:
        model = lmm()
        examples = Examples(test.data, model.conversation)
        # Every world.size-th sample, so that each rank gets a similar mix of lengths.
        mine = generate_answers(
            model, examples, missing[world.rank :: world.size], selected, pool.prompts, test.max_new_tokens, batch,
            insertion,
        )  # fmt: skip
        for part in gather_objects(mine):
            answers.update(part)
    from pipeline.metrics.scoring import Answered, score_task

    lines: list[dict[str, Any]] = []
    answered: list[Answered] = []
    for index, identity in enumerate(test.data.ids):
        sample = test.data[index]
        prediction = answers[index] if index in answers else known[identity, wanted[index]]
        answered.append(Answered(prediction, sample.answer, sample.meta, sample.image is not None))
        lines.append({
            "id": identity, "question": sample.question, "prediction": prediction, "answer": sample.answer,
            "selected": chosen[index], "similarity": [round(s, 6) for s in scores[index].tolist()],
        })  # fmt: skip
    scored = score_task(test.metric, answered, test.scoring)
    for line, points in zip(lines, scored.points, strict=True):
        line["score"] = points
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETS_FILE, {**prints, PROJECTOR: projector} if projector else prints)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        summary = {"metric": test.metric, "scoring": test.scoring, "samples": len(lines), "score": scored.percent}
        write_json(folder / f"{test.name}.score.json", {**summary, "parts": scored.parts})
    barrier()
    return scored.percent


def _known_answers(task: str, folders: Iterable[Path]) -> dict[tuple[str, tuple[str, ...]], str]:
    """Answers of earlier evaluations by (sample id, fingerprints of the projector and the inserted sets)."""
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    for folder in folders:
        try:
            prints = json.loads((folder / SETS_FILE).read_text("utf-8"))
            lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text("utf-8").splitlines()]
            for line in lines:
                used = (prints.get(PROJECTOR, ""), *(prints[name] for name in line["selected"]))
                known[line["id"], used] = line["prediction"]
        except (OSError, ValueError, KeyError):
            continue  # not there, or not whole: it is generated anew
    return known


def task_similarity(test: Test, pool: PromptPool, image_weight: float) -> Tensor:
    """Similarities [N, T] of a test set's samples to the pool's prototypes."""
    keys = test.data.keys
    if not len(pool):
        return torch.zeros(len(test.data), 0)
    return similarity(keys.image, keys.text, pool.prototypes.cpu(), image_weight, keys.has_image)


def routing_accuracy(tests: Sequence[Test], pool: PromptPool, image_weight: float) -> dict[str, list[float]]:
    """Share (percent) of each task's test samples whose most similar set is the task's own: both keys, and either
    alone.

    Samples without an image are routed by their text whatever the weight. Set i must be that of task i.
    """
    result: dict[str, list[float]] = {}
    for name, weight in (("accuracy", image_weight), ("image_only", 1.0), ("text_only", 0.0)):
        result[name] = [
            100.0 * float((task_similarity(test, pool, weight).argmax(1) == number).double().mean())
            for number, test in enumerate(tests)
        ]
    return result


def matrix(
    tasks: Sequence[str],
    zero_shot: list[float] | None,
    accuracy: list[list[float | None]],
    routing: Any,
    ahead: list[float | None] | None = None,
    majority: list[float] | None = None,
) -> dict[str, Any]:
    """The content of matrix.json.

    `ahead` [T] are the scores of tasks just before their own stage, where measured; `majority` [T] those of each
    task's most frequent training answer.
    """
    from pipeline.metrics.continual import retention_per_task, summarise

    metrics: dict[str, Any] = {"zero_shot": _mean(zero_shot)}
    if accuracy:
        metrics = {**summarise(accuracy, zero_shot, ahead), "retention_per_task": retention_per_task(accuracy)}
    content: dict[str, Any] = {"tasks": list(tasks), "zero_shot": zero_shot, "accuracy": accuracy, "metrics": metrics}
    content |= {"majority": majority} if majority else {}
    content |= {"ahead": ahead} if ahead else {}
    return {**content, "routing": routing} if routing else content


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
