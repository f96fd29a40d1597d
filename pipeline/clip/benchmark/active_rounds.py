"""Trains and evaluates a unit that asks for labels: in each round it selects, asks, and trains new prompts on all.

A round is a unit of its own for training and evaluation, in `rounds/NN/` of the asking unit's folder: `asked.json`, the
images chosen, written before anybody is asked; `selection.json`, the same with labels, written before the training; and
`learned/` with prompts and result. A restart goes on inside the round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.active.oracle import Oracle, SplitOracle
from pipeline.clip.active.person import PersonOracle
from pipeline.clip.active.selection import Generators, Scored, Selection, Selector
from pipeline.clip.benchmark.evaluate import TestImages
from pipeline.clip.benchmark.pool_scores import score_pool
from pipeline.clip.benchmark.results import RoundFacts, UnitResult
from pipeline.clip.benchmark.scores import Counts
from pipeline.clip.benchmark.unit_evaluator import UnitEvaluator
from pipeline.clip.benchmark.unit_files import UnitFiles
from pipeline.clip.benchmark.unit_trainer import UnitTrainer
from pipeline.clip.images.classes import UNLABELLED
from pipeline.clip.images.prepared import ClassGroup, PreparedDataset
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.learning.protocol import steps_per_epoch
from pipeline.clip.learning.unit import Round, Unit
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.recipe import ClipRecipe
from pipeline.clip.recipe_active import ActiveConfig, refuse_small_pool
from pipeline.errors import UserError
from pipeline.files.atomic import write_json
from pipeline.ranks.world import on_main
from pipeline.runs.layout import labels_file, unfinished
from pipeline.runs.session import Session
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)
ROUNDS, ASKED, SELECTION, LEARNED = "rounds", "asked.json", "selection.json", "learned"


@dataclass(frozen=True)
class Workshop:
    """What trains and evaluates the units of a benchmark."""

    session: Session
    models: ClipModels
    files: UnitFiles
    tracker: Tracker
    trainer: UnitTrainer
    evaluator: UnitEvaluator


class AskingUnit:
    """One unit that asks for labels.

    Args:
        recipe: the benchmark's recipe.
        unit: the unit.
        data: its dataset.
        workshop: trains and evaluates its rounds.
        oracle: gives labels; None: as the recipe's `active.oracle` says.
    """

    def __init__(
        self, recipe: ClipRecipe, unit: Unit, data: PreparedDataset, workshop: Workshop, oracle: Oracle | None = None
    ) -> None:
        assert data.train is not None
        self.recipe, self.unit, self.data, self.work = recipe, unit, data, workshop
        self.active = recipe.active or ActiveConfig()
        self.names = tuple(data.classes.names)
        self._oracle = oracle
        self._tracked: set[int] = set()  # rounds whose scores the tracker has
        self.pool = TestImages(data.train, workshop.models.pixels, workshop.session.world, recipe.evaluate_batch)
        self.size = len(data.train)
        refuse_small_pool(
            self.active, unit.method, self.size, len(self.names), f"{unit.method.name}, {unit.dataset.name}"
        )

    def train(self, evaluate: bool) -> dict[str, Tensor]:
        """Go through all rounds that are not finished; returns the values of the last one.

        With `evaluate` each round is evaluated on the test images as soon as it is trained.
        """
        work, values = self.work, None
        folder = unfinished(work.files.folder(self.unit))
        selections: list[Selection] = []
        for number in range(self.active.rounds):
            work.session.stop_if_told(f"before round {number + 1} of {self.unit.label}")
            found = on_main(work.session.world, lambda n=number: self._read(folder, n))  # type: ignore[misc]
            if found is None:
                found = self._select(folder, selections, values)
            selections.append(found)
            current = self._round(folder, selections)
            values = work.files.restore(current)
            if values is None:
                values = work.trainer.train(current)
            if evaluate:
                self._evaluate(current, values, selections)
        assert values is not None
        meta = json.loads((self._round(folder, selections).folder(Path()) / "meta.json").read_text("utf-8"))
        kept = {name: value for name, value in meta.items() if name not in ("format", "sha256", "data")}
        work.files.save(self.unit, values, {**kept, "seed": self.unit.seed, "rounds": self.active.rounds})
        return values

    def evaluate(self) -> UnitResult:
        """The result of a unit whose rounds are all trained."""
        folder = self.work.files.folder(self.unit)
        counts: dict[str, Counts] = {}
        names: dict[str, tuple[str, ...]] = {}
        facts: list[RoundFacts] = []
        selections: list[Selection] = []
        for number in range(self.active.rounds):
            selection = on_main(self.work.session.world, lambda n=number: self._read(folder, n))  # type: ignore[misc]
            if selection is None:
                raise UserError(f"{folder} lacks its round {number + 1}. Remove the folder to train the unit again.")
            selections.append(selection)
            current = self._round(folder, selections)
            values = self.work.files.restore(current)
            if values is None:
                raise UserError(f"{current.folder(Path())} is no finished round. Remove {folder} to train it again.")
            result = self._evaluate(current, values, selections)
            counts |= result.groups
            names |= result.names
            facts.append(RoundFacts.of(selections, len(self.names)))
        unit = self.unit
        return UnitResult(unit.method.name, unit.dataset.name, unit.seed, counts, names, tuple(facts))

    def _evaluate(self, current: Round, values: Mapping[str, Tensor], selections: list[Selection]) -> UnitResult:
        result = self.work.files.result(current)
        if result is None:
            result = self.work.evaluator.evaluate(current, dict(values))
            self.work.files.write_result(current, result)
        if current.number in self._tracked:
            return result
        self._tracked.add(current.number)
        facts = RoundFacts.of(selections, len(self.names))
        numbers = {"round": float(len(selections)), "classes_without_label": float(facts.classes_without)}
        for counts in result.groups.values():  # one, or none without test images
            numbers["accuracy_by_labels"] = 100 * counts.accuracy
        self.work.tracker.metrics(numbers, facts.paid)
        return result

    def _select(self, folder: Path, selections: list[Selection], values: Mapping[str, Tensor] | None) -> Selection:
        """Choose the images of the next round and have them labelled; all ranks call it, rank 0 decides and writes."""
        number = len(selections)
        selector = Selector(
            self.active,
            self.unit.method,
            self.unit.identity(self.data),
            self.pool_names,
            len(self.names),
        )
        world, place = self.work.session.world, self._folder(folder, number)
        asked = on_main(world, lambda: self._read(folder, number, ASKED))
        scored = self._scored(selections, values) if asked is None and selector.needs_model(number) else None

        def choose() -> Selection:
            found = asked
            if found is None:
                generators = Generators(self.unit.seed)
                if selections:
                    generators.restore(selections[-1].generators)
                found = selector.select(selections, scored, generators)
                place.mkdir(parents=True, exist_ok=True)
                # A person may answer after days; by then other ranks or another machine could choose other images.
                write_json(place / ASKED, found.to_json())
            answered = found.answered(self._oracle_of(number))
            write_json(place / SELECTION, answered.to_json())
            return answered

        return on_main(world, choose)

    def _oracle_of(self, number: int) -> Oracle:
        """Who says the labels in the round of this number (from 0)."""
        if self._oracle is not None:
            return self._oracle
        if self.active.oracle == "labels":
            return SplitOracle(self.data.classes.train)
        assert self.data.train is not None
        return PersonOracle(
            self.work.session.path,
            self.unit.dataset.name,
            self.names,
            self.data.train,
            self.unit.label,
            number + 1,
            self.active.rounds,
        )

    @property
    def pool_names(self) -> list[str]:
        """The files of the pool's images, by row."""
        assert self.data.train is not None
        return list(self.data.train.ids)

    def _scored(self, selections: list[Selection], values: Mapping[str, Tensor] | None) -> Scored:
        """The pool as the model of the round before sees it; before the first round, as the zero-shot model does."""
        models, unit = self.work.models, self.unit
        if values is None:
            template = unit.dataset.description.template
            learner = learner_of_sizes("zero_shot", models.backbone.sizes, template=template)
        else:
            learner = models.learner(unit, self.names)
            learner.load_state_dict(dict(values))
        module = models.classifier(learner, self.names, None if values is None else unit.descriptions)
        labelled = [row for selection in selections for row in selection.rows]
        return score_pool(module, self.pool, self.size, labelled)

    def _round(self, folder: Path, selections: list[Selection]) -> Round:
        """The unit that trains on the labels of these rounds."""
        unit, number = self.unit, len(selections) - 1
        train = self.recipe.train_of(unit.method, unit.dataset.name)
        known: list[list[tuple[int, int]]] = [[]]  # (row, label) after each round
        for selection in selections:
            pairs = zip(selection.rows, selection.labels, strict=True)
            known.append([*known[-1], *(pair for pair in pairs if pair[1] != UNLABELLED)])
        if not known[-1]:
            raise UserError(
                f"{unit.label} has no image of any class after round {number + 1}, so nothing can be learned. Remove "
                f"{folder} and {labels_file(self.work.session.path, unit.dataset.name)} to be asked again, or start a "
                "new run with other images or classes."
            )
        steps = [train.epochs * steps_per_epoch(len(found), train.global_batch) for found in known[1:]]
        rows, labels = zip(*known[-1], strict=True)
        groups = ((f"round{number + 1}", unit.dataset.name, unit.group),) if unit.groups else ()
        return Round(
            unit.method,
            unit.dataset,
            unit.seed + number,
            unit.group,
            groups,
            asking=unit,
            number=number + 1,
            place=self._folder(folder, number) / LEARNED,
            shots=ClassGroup(self.names, rows, labels),
            first_step=sum(steps[:-1]),
            descriptions=unit.descriptions,
        )

    def _folder(self, folder: Path, number: int) -> Path:
        return folder / ROUNDS / f"{number + 1:02d}"

    def _read(self, folder: Path, number: int, name: str = SELECTION) -> Selection | None:
        """The selection of a round; None where it was not made yet, UserError for that of another pool."""
        path = self._folder(folder, number) / name
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text("utf-8"))
            found = Selection.from_json(content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}). Remove {folder} to begin the unit again.") from error
        if found.pool != self.unit.identity(self.data):
            raise UserError(
                f"{path} was chosen from other images or classes than those prepared now, so its labels would mean "
                f"something else. Restore the data, or remove {folder} to begin the unit again."
            )
        return found
