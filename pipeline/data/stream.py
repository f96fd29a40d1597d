"""Shards read in their own order through WebDataset, from local paths, commands or addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import webdataset as wds

from pipeline.data.sample import Sample
from pipeline.errors import UserError


def stream(urls: str | Iterable[str]) -> Iterator[Sample]:
    """Yield the samples of shards in shard order through WebDataset: local paths, `pipe:` commands or http urls.

    For remote data. Shards are split over ranks and workers, so on several ranks it is not exactly-once.
    """
    dataset = wds.WebDataset(
        urls if isinstance(urls, str) else list(urls),
        shardshuffle=False,
        nodesplitter=wds.split_by_node,
        empty_check=False,  # a rank or worker without a shard yields nothing
    )
    for record in dataset:
        images = [name for name in record if name != "json" and not name.startswith("__")]
        if "json" not in record or len(images) > 1:
            raise UserError(
                f"{record['__url__']}: {record['__key__']} has the members {', '.join(sorted(record))}; "
                "expected a json and at most one image."
            )
        yield Sample.from_json(record["json"], record[images[0]] if images else None)
