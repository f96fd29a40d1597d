"""Batches on their device: copied when a step needs them, or by another stream while the step before computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Movable(Protocol):
    """A batch in host memory."""

    def to(self, device: torch.device, /) -> Any: ...

    def tensors(self) -> list[Tensor]: ...


def copies_ahead(asked: bool, device: torch.device) -> bool:
    """Whether batches are copied ahead, as a recipe asks; logs that nothing comes of it on a device without streams."""
    if asked and device.type != "cuda":
        log.info("train.copy_ahead does nothing on %s: batches are in the memory that computes already", device.type)
    return asked and device.type == "cuda"


def on_device(steps: Iterator[list[Any]], device: torch.device, ahead: bool) -> Iterator[list[Any]]:
    """Yield the batches of every step on a device.

    Args:
        steps: the micro-batches of each step, in host memory; in pinned memory for `ahead`.
        device: a GPU for `ahead`.
        ahead: the copies of a step begin before the step before it is computed.
    """
    if not ahead:
        for batches in steps:
            yield [batch.to(device) for batch in batches]
        return
    stream = torch.cuda.Stream(device)
    waiting = _copied(next(steps, None), device, stream)
    while waiting is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        # The allocator would give a tensor's memory to the next copy while the step that reads it still runs.
        for batch in waiting:
            for tensor in batch.tensors():
                tensor.record_stream(torch.cuda.current_stream(device))
        ready, waiting = waiting, _copied(next(steps, None), device, stream)
        yield ready


def _copied(batches: list[Movable] | None, device: torch.device, stream: torch.cuda.Stream) -> list[Any] | None:
    """The batches of a step, whose copies were queued on the stream; None after the last step."""
    if batches is None:
        return None
    with torch.cuda.stream(stream):
        return [batch.to(device) for batch in batches]
