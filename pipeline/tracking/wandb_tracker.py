"""The tracker that sends curves to Weights & Biases: a group for the run, a run of it for each stage or unit."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.files.atomic import write_json
from pipeline.tracking.curves import WHOLE, Curves, CurveTracker
from pipeline.tracking.tracker import RunFacts

log = logging.getLogger(__name__)
RUNS = Path("wandb", "runs.json")  # in the run's folder: by label the id in the service, and the last step
FORBIDDEN = re.compile(r"[/\\#?%:]")  # characters that a project's name may not have


class WandbRun(Curves):
    """A run of the service. Its history only grows, so steps that an earlier call sent are left out."""

    def __init__(self, run: Any, known: dict[str, Any], save: Any) -> None:
        self.run, self.known, self._save = run, known, save

    def add(self, values: Mapping[str, float], step: int) -> None:
        if step < self.known["step"] or (step == self.known["step"] and self._sent(values)):
            self.run.summary.update(dict(values))  # of a matrix that was computed anew
            return
        self.run.log(dict(values), step=step)
        names = [] if step > self.known["step"] else self.known["names"]
        self.known.update(step=step, names=[*names, *values])
        self._save()

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)

    def _sent(self, values: Mapping[str, float]) -> bool:
        return bool(set(values) & set(self.known["names"]))


class WandbTracker(CurveTracker):
    """Sends to the project `tracking.wandb_project`; mode and key are wandb's own (WANDB_MODE, `wandb login`)."""

    service, field = "Weights & Biases", "tracking.wandb"

    def __init__(self, facts: RunFacts, run_path: Path) -> None:
        super().__init__(facts, run_path)
        self._runs = _read(run_path / RUNS)

    def curves(self, label: str) -> WandbRun:
        import wandb  # an extra, and only rank 0 needs it

        known = self._runs.setdefault(label, {"id": secrets.token_hex(4), "step": -1, "names": []})
        project = self.facts.tracking.wandb_project or self.facts.tracking.experiment or self.facts.name
        (self.run_path / RUNS).parent.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=FORBIDDEN.sub("-", project)[:128],
            id=known["id"],
            name=self.run_path.name if label == WHOLE else label,
            group=self.run_path.name,
            job_type="run" if label == WHOLE else "stage",
            config=self.settings,
            dir=str(self.run_path),
            mode=_mode(wandb),
            resume="allow",
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self._save()
        return WandbRun(run, known, self._save)

    def _save(self) -> None:
        write_json(self.run_path / RUNS, self._runs)


def _mode(wandb: Any) -> Literal["offline"] | None:
    """None: as wandb says, from WANDB_MODE and its settings; "offline" where it would ask for a key, and wait."""
    if os.environ.get("WANDB_MODE"):
        return None
    with suppress(Exception):  # whatever it reads the key from
        if wandb.api.api_key:
            return None
    log.info("there is no key of Weights & Biases; `wandb sync` sends what is kept in the run's folder.")
    return "offline"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call kept; nothing where the file is missing or damaged, so that new runs begin."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and all({"id", "step", "names"} <= set(entry) for entry in content.values()):
            return content
    return {}
