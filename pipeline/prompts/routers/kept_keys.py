"""The sample of its training keys that a task's state keeps, from which routers and calibration are computed."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.data.keys import AnyKeys, Keys, in_parts, join_keys
from pipeline.errors import UserError
from pipeline.prompts.routers.states import State, States

KEPT = "keys."  # how the names of a state's kept keys begin, which stay in their own precision
IMAGE, TEXT, HAS_IMAGE = f"{KEPT}image", f"{KEPT}text", f"{KEPT}has_image"
AT_ONCE = 1 << 14  # samples that are looked at together
PER_TASK = 128  # samples whose keys are kept unless a recipe says otherwise


_PRINTS: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class KeptKeys:
    """The kept keys of T tasks, one task behind the other, sorted by their content.

    So sums over them have the same bits whatever the order in which the tasks were learned.
    """

    keys: AnyKeys  # n rows
    order: Tensor  # [T] numbers of the tasks, as their keys follow each other
    counts: Tensor  # [T] samples of each task in `order`

    @property
    def places(self) -> Tensor:
        """Of each row [n] the place of its task in `order`."""
        return torch.repeat_interleave(torch.arange(len(self.order)), self.counts)

    @property
    def tasks(self) -> Tensor:
        """Of each row [n] the number of its task."""
        return self.order[self.places]

    def balanced(self, most: int) -> Tensor:
        """At most `most` rows, about as many of each task and at least one, in ascending order."""
        starts = self.counts.cumsum(0) - self.counts
        each = max(1, most // len(self.order))
        parts = zip(starts.tolist(), self.counts.tolist(), strict=True)
        return torch.cat([start + sampled_rows(count, each) for start, count in parts])


def kept_sample(keys: AnyKeys, most: int = PER_TASK) -> dict[str, Tensor]:
    """The keys of at most `most` samples in float16, as a part of a task's state.

    The samples are drawn by their number alone, so the same data gives the same sample everywhere. Evenly spaced ones
    would follow any period in the data, such as three wordings in turn.
    """
    rows = sampled_rows(len(keys.text), most)
    return {
        IMAGE: keys.image[rows].to(torch.float16),
        TEXT: keys.text[rows].to(torch.float16),
        HAS_IMAGE: keys.has_image[rows].bool(),
    }


def sampled_rows(count: int, most: int) -> Tensor:
    """At most `most` of `count` rows, drawn without replacement and in ascending order."""
    if count <= most:
        return torch.arange(count)
    # RandomState, because numpy keeps its numbers the same in all versions.
    return torch.from_numpy(np.sort(np.random.RandomState(count % 2**32).permutation(count)[:most]))


def keeps(state: State) -> bool:
    """Whether a state has kept keys."""
    return TEXT in state


def sound(state: State) -> bool:
    """Whether a state's tensors are finite and its kept keys, if it has any, one row per sample each."""
    kept = [state[name] for name in (IMAGE, TEXT, HAS_IMAGE) if name in state]
    if kept:
        if len(kept) < 3 or kept[0].ndim != 2 or kept[2].ndim != 1 or not len(kept[2]):
            return False
        if kept[0].shape != kept[1].shape or len(kept[2]) != len(kept[0]):
            return False
    return all(bool(value.isfinite().all()) for value in state.values())


def kept_keys(states: States) -> KeptKeys | None:
    """The kept keys of all tasks; None where a task has none."""
    if not len(states) or not all(keeps(state) for state in states):
        return None
    return states.once("kept keys", lambda: _joined(states))


def keys_of(state: State) -> Keys:
    """The kept keys of one task."""
    return Keys(state[IMAGE], state[TEXT], state[HAS_IMAGE].bool(), {})


def kept_print(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor of kept keys, computed once: they never change, and a thousand tasks have 400 MB."""
    if tensor not in _PRINTS:
        found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        _PRINTS[tensor] = found.hexdigest()
    return _PRINTS[tensor]


def _joined(states: States) -> KeptKeys:
    prints = [[kept_print(state[name]) for name in (IMAGE, TEXT, HAS_IMAGE)] for state in states]
    order = sorted(range(len(states)), key=lambda number: prints[number])
    parts = [keys_of(states[number]) for number in order]
    counts = torch.tensor([len(part.text) for part in parts])
    return KeptKeys(join_keys([(part, len(part.text)) for part in parts]), torch.tensor(order), counts)


def picked(keys: AnyKeys, rows: Tensor) -> Keys:
    """The keys at these rows [B], as tensors in memory."""
    return Keys(keys.image[rows], keys.text[rows], keys.has_image[rows].bool(), keys.identity)


def require_finite(keys: AnyKeys, whose: str) -> None:
    """Raise UserError where keys are not finite, naming how many samples of `whose` have such; in parts."""
    count = 0
    for part in in_parts(keys, AT_ONCE):
        images = part.image.isfinite().all(1) | ~part.has_image.bool()
        count += int((~(images & part.text.isfinite().all(1))).sum())
    if count:
        raise UserError(
            f"{count} of {len(keys.text)} samples of {whose} have routing keys that are not finite numbers, so their "
            "task cannot be recognised. Run `python -m pipeline prepare RECIPE` to compute them anew; if they come out "
            "the same, the CLIP overflows in its precision or its weights are damaged."
        )
