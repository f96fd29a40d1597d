"""A benchmark with its models and data opened, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.clip.benchmark.unit_files import UnitFiles
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.recipe import ClipRecipe
from pipeline.runs.session import Session
from pipeline.tracking.tracker import Tracker


@dataclass(frozen=True)
class OpenBenchmark:
    """The objects that search, training and evaluation of units share."""

    recipe: ClipRecipe
    session: Session  # the ranks, the graceful shutdown and the watchdog
    models: ClipModels  # makes learner, classifier and engine of a unit
    data: Mapping[str, PreparedDataset]  # the prepared datasets by name
    files: UnitFiles  # reads and writes the units' folders
    tracker: Tracker  # receives the metrics of every unit
