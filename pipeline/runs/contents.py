"""Models of the parts of a run's files that are read, so that a damaged file is reported before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.messages import sentence
from pipeline.errors import UserError

Scores = list[float | None]
ADVICE = "evaluate the run again or restore the file"


class Content(BaseModel):
    """The part of a file that is read; further fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class DataPart(Content):
    """`data` of config.yaml."""

    prepared: str | None = None
    tasks: list[dict[str, Any]] | None = None


class ConfigFile(Content):
    """config.yaml, of any version."""

    data: DataPart = DataPart()
    model: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    method: dict[str, Any] = {}


class StateFile(Content):
    """run.json of a sequence."""

    stages: list[str] | None = None
    skipped: list[Any] | dict[str, Any] | None = None


class BenchmarkState(Content):
    """run.json of a benchmark."""

    units: list[str] = []
    units_done: int = 0
    status: str = "new"


class FormatFree(Content):
    """`format_free` of matrix.json: the scores without the format of the answers."""

    accuracy: list[Scores] | None = None  # a row [T] for each of `accuracy`
    zero_shot: Scores | None = None  # [T]


class MatrixFile(Content):
    """matrix.json: T tasks, scores in percent; lengths and ranges are checked where they are used."""

    tasks: list[str] | None = None
    accuracy: list[Scores] | None = None  # [T, T]
    zero_shot: Scores | None = None  # [T]
    majority: Scores | None = None  # [T]
    ahead: Scores | None = None  # [T]
    told: list[Scores | None] | None = None  # [T, T], a row for each of `accuracy`; null where it was not measured
    routing: dict[str, Any] | None = None
    format_free: FormatFree | None = None
    costs: dict[str, float | None] | None = None


class Routing(Content):
    """`routing` of matrix.json, [T] each but `confusion`: own task -> task whose set ranks first -> percent."""

    accuracy: Scores | None = None
    image_only: Scores | None = None
    text_only: Scores | None = None
    confusion: dict[str, dict[str, float]] | None = None


class LogLine(Content):
    """A line of metrics.jsonl."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    step: float


class StageMeta(Content):
    """meta.json of a stage: the part that the report shows."""

    steps: int | None = None
    seconds: float | None = None
    world_size: int | None = None
    loss: float | None = None
    trained_parameters: int | None = None
    operations_per_sample: float | None = None


class PredictionLine(Content):
    """A line of eval/<when>/<task>.jsonl."""

    score: float | None = None
    similarity: list[float] | None = None
    selected: list[str] | None = None
    probability: list[float] | None = None
    unfamiliar: bool | None = None


def require(content: Any, kind: type[Content], place: str) -> None:
    """Raise UserError with the first error unless `content`, found at `place`, is valid for `kind`."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{place}: {sentence(error, kind, most=1).rstrip('.')}; {ADVICE}.") from None


def read_json(path: Path, kind: type[Content]) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no file; UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {ADVICE}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; {ADVICE}.")
    require(content, kind, str(path))
    return content
