"""Prints the results of a benchmark."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print the variants and ratios of a result as tables, or the result as JSON."""
    if as_json:
        print(json.dumps(result))
        return
    # When stdout is not a terminal use a wide table, so that names are not truncated in logs.
    console = Console(width=None if sys.stdout.isatty() else 160)
    tables = {"variant": result.get("variants", {}), "goal": result.get("goals", {})}
    tables |= {f"ratio against {name}": rows for name, rows in result.get("ratios", {}).items()}
    for title, rows in tables.items():
        if rows:
            table = Table(title, *next(iter(rows.values())))
            for column in table.columns:
                column.overflow = "fold"
            for row, numbers in rows.items():
                table.add_row(row, *map(str, numbers.values()))
            console.print(table)
    for name, value in result.items():
        if name not in ("variants", "goals", "ratios"):
            console.print(f"{name}: {value}", highlight=False)
