"""Shows how far downloads are: a bar for each file on a terminal, else a line when it begins and when it is whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_prep.download.run import Downloads


def with_progress(downloads: Downloads, console: Console | None = None) -> dict[str, Any]:
    """Run downloads and show their progress; raises as they do."""
    console = console or Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, Any] = {}

        def tell(url: str, there: int, whole: int | None) -> None:
            if url not in bars:
                bars[url] = progress.add_task(url.rpartition("/")[2][-40:], total=whole)
                if not console.is_terminal:
                    size = "unknown size" if whole is None else f"{whole} bytes"
                    console.print(f"{url}: {size}", soft_wrap=True, highlight=False, markup=False)
            progress.update(bars[url], completed=there, total=whole)
            if not console.is_terminal and there == whole:
                console.print(f"{url}: whole", soft_wrap=True, highlight=False, markup=False)

        def say(line: str) -> None:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

        return dataclasses.replace(downloads, tell=tell, say=say).run()
