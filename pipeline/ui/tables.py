"""Tables of the page: runs side by side, the settings in which they differ, an accuracy matrix, and routing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.errors import UserError
from pipeline.report.settings import Fact, head_facts
from pipeline.report.tables import comparison_header, comparison_rows, seed_rows
from pipeline.runs.folder import RunFolder
from pipeline.tracking.description import flatten
from pipeline.tracking.store import STORE_VARIABLE, tracking_uri

NOT_COMPARED = ("run_dir",)
SHOWN_VALUE = 300  # characters of a setting
TILES = {
    "last": "mean score after the last stage",
    "forgetting": "best earlier score minus the last",
    "routing": "samples routed to their own task",
    "routing_loss": "what routing costs: told minus routed",
    "gain": "last minus zero-shot",
}


def comparable(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """The runs by their lists of tasks, in the order of the first run of each."""
    groups: dict[tuple[str, ...], list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(tuple(run.tasks), []).append(run)
    return list(groups.values())


def side_by_side(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The table of runs with the same tasks: columns, rows, and means over seeds."""
    return {"header": comparison_header(runs[0].tasks), "rows": comparison_rows(runs), "seeds": seed_rows(runs)}


def differing(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings, by dotted name, in which the recipes of runs differ, with each run's value, "" for none."""
    flat = {name: flatten(config) for name, config in configs.items()}
    names = sorted({setting for settings in flat.values() for setting in settings})
    rows = [(name, [settings.get(name, "") for settings in flat.values()]) for name in names]
    return [
        (name, [value[:SHOWN_VALUE] for value in values])
        for name, values in rows
        if len(set(values)) > 1 and name.partition(".")[0] not in NOT_COMPARED
    ]


def tiles(run: RunFolder) -> list[tuple[str, str, float]]:
    """The headline numbers that a run has: name, explanation, percent."""
    shares = [share for share in run.routing.get("accuracy") or [] if share is not None]
    known = {**run.metrics(), "routing": sum(shares) / len(shares) if shares else None}
    return [
        (name.replace("_", " "), text, value) for name, text in TILES.items() if (value := known.get(name)) is not None
    ]


def facts(run: RunFolder) -> list[Fact]:
    """What a run was made with, without unknown entries; its status stands above them."""
    known = [fact for fact in head_facts(run) if fact[0] != "status"]
    further = {"prepared data": (run.config.get("data") or {}).get("prepared"), "updated": run.state.get("updated")}
    return [*known, *((name, str(value)) for name, value in further.items() if value)]


def tracked(run: RunFolder) -> tuple[str, str]:
    """Where the run is in MLflow: `link` and an address if its store is a server, else `command`, or `note` and why."""
    config = run.config.get("tracking") or {}
    known = run.state.get("mlflow")
    known = known if isinstance(known, dict) else {}
    if config.get("enabled") is False or not known.get("parent"):
        return "note", "This run is not tracked in MLflow."
    configured = config.get("uri")
    address = urlsplit(str(configured or os.environ.get(STORE_VARIABLE) or ""))
    if address.scheme in ("http", "https") and address.hostname:
        # Without user and password, which belong into no page.
        host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
        place = f"{host}:{address.port}" if address.port else host
        bare = urlunsplit((address.scheme, place, address.path.rstrip("/"), "", ""))
        return "link", f"{bare}/#/experiments/{known.get('experiment', '0')}/runs/{known['parent']}"
    try:
        return "command", f"mlflow ui --backend-store-uri {tracking_uri(configured)}"
    except UserError as error:
        return "note", str(error)


def confusion_rows(
    tasks: Sequence[str], sets: Sequence[str], shares: Mapping[str, Mapping[str, float]], most: int = 40
) -> dict[str, Any]:
    """Routing as a table: of more than `most` sets those that take or lose the largest shares of samples."""
    names = [task for task in sets if any(task in row for row in shares.values()) or task in shares]
    if len(names) > most:
        wrong = {
            name: max(
                [
                    share
                    for task, row in shares.items()
                    for first, share in row.items()
                    if first != task and name in (task, first)
                ],
                default=0.0,
            )
            for name in names
        }
        kept = set(sorted(names, key=lambda name: -wrong[name])[:most])
        names = [name for name in names if name in kept]
    rows = [(task, [(name, shares[task].get(name, 0.0)) for name in names]) for task in tasks if task in shares]
    if len(sets) > most:
        rows = [row for row in rows if row[0] in names]
    return {"sets": names, "rows": rows, "left_out": len(sets) - len(names) if len(sets) > most else 0}
