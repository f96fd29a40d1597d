"""Evaluation: predictions on plain replicas, split over the ranks, and the accuracy matrix made of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.backbones.lmm_beginning import generate_behind
from pipeline.checkpoint import write_json
from pipeline.data.collate import Batch, Examples, StageData, collate_prompts
from pipeline.data.grouped_order import image_groups
from pipeline.distributed import World, gather_objects, on_main
from pipeline.errors import Interrupted
from pipeline.files import replacing
from pipeline.metrics.scoring import Answered, TaskScore, score_task
from pipeline.progress import counted
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.insertion import gather_sets, insert_prompts
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import NO_SET, similarity
from pipeline.prompts.two_passes import cut_behind_images

SETS_FILE = "sets.json"  # beside the predictions: the fingerprint of every prompt set by name
UNFINISHED_FILE = "{}.unfinished.json"  # the answers that there were when an evaluation was stopped
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
    bar: str | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, str]:
    """Greedy answers of the samples `indices`, by index; `selected` [N, m] numbers of the sets [T, L, D] for all
    samples, which stand where `insertion` says (see `insertion_place`).

    Samples of similar length are generated together. How samples are batched changes the order in which numbers are
    added and nothing else: float32 answers were always the same, in bfloat16 on a GPU close calls may differ.
    `bar` names the bar that a terminal shows. `go_on`
    is asked before every batch; the batches after its first no are left out.
    """
    device = lmm.model.device
    bank, selected = _used_sets(sets, selected, indices)
    bank = bank.to(device, lmm.dtype)
    lengths = {
        index: len(examples[index].prompt)
        + int((selected[index] != NO_SET).sum()) * (bank.shape[1] if len(bank) else 0)
        for index in indices
    }
    ordered = sorted(indices, key=lambda index: (-lengths[index], index))
    answers: dict[int, str] = {}
    for part in counted(_batches(examples, ordered, batch), len(ordered), bar):
        if not go_on():
            break
        inputs = collate_prompts(examples, part, selected).to(device)
        answer = generate_once if examples.sharing == "none" else _generate_behind
        generated = answer(lmm, inputs, bank, max_new_tokens, insertion)
        for index, tokens in zip(part, generated, strict=True):
            answers[index] = examples.conversation.decode(tokens)
    return answers


def _used_sets(sets: Tensor, selected: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the sets [T, L, D] those that the samples `indices` get, and their numbers among these for all samples.

    So a pool of a thousand sets takes no more of the device's memory than one of eight.
    """
    used = selected[list(indices)].unique()
    used = used[used != NO_SET]
    numbers = torch.full((len(sets) + 1,), NO_SET, dtype=torch.long)  # the last is that of NO_SET itself
    numbers[used] = torch.arange(len(used))
    return sets[used.to(sets.device)], numbers[selected]


def generate_once(lmm: LMM, inputs: Batch, bank: Tensor, max_new_tokens: int, insertion: str) -> list[list[int]]:
    """Answers [B] to a batch, each sample computed from its first token on."""
    embeddings, attention, places = embed_with_sets(lmm, inputs, bank, insertion)
    return lmm.generate(embeddings, attention, max_new_tokens, places, inputs.images)


def _generate_behind(lmm: LMM, inputs: Batch, bank: Tensor, max_new_tokens: int, insertion: str) -> list[list[int]]:
    """Answers [B] to a batch, in which what samples begin with in common is computed once."""
    cut = cut_behind_images(lmm, inputs, bank, insertion)
    embeddings, attention = cut.embeddings, cut.attention
    if insertion == "after_image" and inputs.selected.shape[1] and len(bank):
        vectors, valid = gather_sets(bank, inputs.selected)
        foremost = torch.zeros_like(cut.groups)
        embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, place=foremost)
        used = int(attention.sum(1).max())
        embeddings, attention = embeddings[:, :used], attention[:, :used]
    return generate_behind(lmm, cut.beginning, cut.groups, embeddings, attention, max_new_tokens)


def _batches(examples: Examples, ordered: list[int], batch: int) -> Iterator[list[int]]:
    """Batches of so many samples in this order, except that those which share an image follow its first."""
    if examples.sharing != "none":
        first: dict[bytes, int] = {}
        for place, index in enumerate(ordered):
            first.setdefault(examples[index].picture, place)
        ordered = sorted(ordered, key=lambda index: first[examples[index].picture])
    for start in range(0, len(ordered), batch):
        yield ordered[start : start + batch]


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
    share_images: bool = False,
    made_by: dict[str, str] | None = None,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Score a test set after a stage, write its predictions, and return its score in percent.

    `selected` [N, m] and `scores` [N, T] (similarities) belong to the samples of `test`. Answers that an evaluation
    in the `earlier` folders got with the same sets are taken from there (design.md decision 8). `lmm` is called only
    if something has to be generated. `projector` is the fingerprint of a trained image projector, an answer's third
    ingredient, "" where it is the base model's. `share_images` computes an image once for all questions about it that
    get the same sets; the insertion after_image does so anyway. `made_by` are fingerprints of the base model and of
    what else its checkpoint says, under names of their own. `told_to_stop` is asked before every batch, by all ranks
    together, and has to tell all of them the same: then the answers that are there are kept for the next attempt, and
    Interrupted is raised.
    """
    path = folder / f"{test.name}.jsonl"
    prints = {name: pool.fingerprint(index) for index, name in enumerate(pool.names)}
    chosen = [[pool.names[number] for number in row if number != NO_SET] for row in selected.tolist()]
    wanted = [(projector, *(prints[name] for name in row)) for row in chosen]
    made_with = {"data": test.data.fingerprint, "max_new_tokens": test.max_new_tokens, "insertion": insertion}
    made_with |= made_by or {}

    def look() -> tuple[dict[int, str], list[int]]:
        known = _known_answers(test.name, [folder, *earlier], made_with)
        wants = [(identity, wanted[index]) for index, identity in enumerate(test.data.ids)]
        found = {index: known[want] for index, want in enumerate(wants) if want in known}
        return found, [index for index in range(len(wants)) if index not in found]

    # By rank 0 alone: another rank may see other files, and would wait for answers that nobody else generates.
    answers, missing = on_main(world, look)
    if missing:
        model = lmm()
        examples = Examples(test.data, model.conversation, _sharing(model, insertion, share_images))
        share = _share_of(missing, examples, world)
        rounds = _Rounds(max(gather_objects(-(-len(share) // batch))), told_to_stop)
        mine = generate_answers(
            model, examples, share, selected, pool.prompts, test.max_new_tokens, batch, insertion,
            f"answering {test.name}" if world.main else None, rounds.go_on,
        )  # fmt: skip
        rounds.finish()
        for part in gather_objects(mine):
            answers.update(part)
        if rounds.stopped:
            on_main(world, lambda: _keep_answers(folder, test, answers, wanted, made_with))
            raise Interrupted(
                f"Stopped by a signal while {test.name} was evaluated, with {len(answers)} of {len(wanted)} answers, "
                "which are kept. Run the same command again to go on."
            )

    def write() -> float:
        lines, scored = _scored_lines(test, answers, chosen, scores)
        write_json(folder / SETS_FILE, {**prints, PROJECTOR: projector} if projector else prints)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        summary = {"metric": test.metric, "scoring": test.scoring, "samples": len(lines), "score": scored.percent}
        write_json(folder / f"{test.name}.score.json", {**summary, "parts": scored.parts, "made_with": made_with})
        (folder / UNFINISHED_FILE.format(test.name)).unlink(missing_ok=True)
        return scored.percent

    return on_main(world, write)


class _Rounds:
    """One batch of every rank is a round, between which all may stop; one without batches takes part all the same."""

    def __init__(self, rounds: int, told_to_stop: Callable[[], bool]) -> None:
        self.left, self.stopped, self._told = rounds, False, told_to_stop

    def go_on(self) -> bool:
        self.left -= 1
        self.stopped = self.stopped or self._told()
        return not self.stopped

    def finish(self) -> None:
        """Take part in the rounds that other ranks still have."""
        while self.left > 0 and not self.stopped:
            self.go_on()


def _keep_answers(
    folder: Path, test: Test, answers: dict[int, str], wanted: list[tuple[str, ...]], made_with: dict[str, Any]
) -> None:
    """Write the answers of an unfinished evaluation, for `_known_answers` of the next attempt."""
    kept = [(test.data.ids[index], wanted[index], prediction) for index, prediction in sorted(answers.items())]
    write_json(folder / UNFINISHED_FILE.format(test.name), {"made_with": made_with, "answers": kept})


def _scored_lines(
    test: Test, answers: dict[int, str], chosen: list[list[str]], scores: Tensor
) -> tuple[list[dict[str, Any]], TaskScore]:
    """The lines of a task's prediction file, and its score."""
    lines: list[dict[str, Any]] = []
    answered: list[Answered] = []
    for index, identity in enumerate(test.data.ids):
        sample = test.data[index]
        answered.append(Answered(answers[index], sample.answer, sample.meta, sample.image is not None))
        lines.append({
            "id": identity, "question": sample.question, "prediction": answers[index], "answer": sample.answer,
            "selected": chosen[index], "similarity": [round(s, 6) for s in scores[index].tolist()],
        })  # fmt: skip
    scored = score_task(test.metric, answered, test.scoring)
    for line, points in zip(lines, scored.points, strict=True):
        line["score"] = points
    return lines, scored


def _sharing(lmm: LMM, insertion: str, share_images: bool) -> Literal["none", "image", "sets"]:
    """Which samples of a batch share what they begin with, see `Examples`."""
    if insertion != "after_image" and not share_images:
        return "none"
    lmm.require_two_passes("evaluate.share_images: true" if insertion != "after_image" else "")
    return "image" if insertion == "after_image" else "sets"


def _share_of(missing: list[int], examples: Examples, world: World) -> list[int]:
    """The samples that this rank answers: every world.size-th, so that each rank gets a similar mix of lengths.

    Where samples share images, those of one image (neighbours, by their keys) go to one rank.
    """
    if examples.sharing == "none" or world.size == 1:
        return missing[world.rank :: world.size]
    groups = image_groups(examples.data.keys)[missing]
    return [index for index, group in zip(missing, groups, strict=True) if group % world.size == world.rank]


def _known_answers(
    task: str, folders: Iterable[Path], made_with: dict[str, Any]
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Answers of earlier evaluations by (sample id, fingerprints of the projector and the inserted sets).

    Those that were made with other data, settings or model files than `made_with` are left alone; what a folder does
    not say of its answers is trusted.
    """
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            unfinished = json.loads((folder / UNFINISHED_FILE.format(task)).read_text("utf-8"))
            if unfinished["made_with"] == made_with:
                known |= {(identity, tuple(used)): answer for identity, used, answer in unfinished["answers"]}
        try:
            told = json.loads((folder / f"{task}.score.json").read_text("utf-8")).get("made_with", made_with)
        except (OSError, ValueError, AttributeError):
            told = made_with
        if any(told.get(name, value) != value for name, value in made_with.items()):
            continue
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
