"""Memory of the running batch: estimates of rows, available memory, and detection of out-of-memory errors."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from pipeline.backbones.lmm import LMM

GIB = 1 << 30
SHARE_OF_HOST = 0.5  # of the memory available at start, for a model on the CPU without a given limit
RESERVE = 0.05  # share of a device's memory for what the estimate omits; doubles each time memory runs out
MOST_RESERVE = 0.5
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_cpu")


@dataclass(frozen=True)
class Extent:
    """Tokens of one row: those it has, and the most that may follow."""

    tokens: int
    following: int

    def covering(self, others: Sequence[Extent]) -> Extent:
        """The most of each, of this row and others."""
        each = [self, *others]
        return Extent(max(one.tokens for one in each), max(one.following for one in each))


class KeyValueMemory:
    """Memory for keys and values on the model's device: at most `limit` bytes; None: what the device has.

    On a GPU free memory is queried at every admission, since other processes may use it too. On the CPU the default
    limit is half of the memory that is available at start.
    """

    def __init__(self, lmm: LMM, limit: int | None = None) -> None:
        self.device = lmm.model.device
        text = lmm.model.config.text_config
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        element = torch.empty(0, dtype=lmm.dtype).element_size()
        pairs = 2 * (getattr(text, "num_key_value_heads", None) or heads) * size
        self.layers = text.num_hidden_layers
        self.token_bytes = self.layers * pairs * element
        # Activations of one layer while a prompt is read; the MLP's are the widest.
        self.prompt_bytes = (12 * text.hidden_size + 3 * text.intermediate_size) * element
        self.score_bytes = 8 * text.vocab_size  # of a row's next token, in float32 and ordered by rules of generation
        if limit is None and self.device.type != "cuda":
            limit = int(SHARE_OF_HOST * psutil.virtual_memory().available)
        self.limit = limit
        self.reserve = RESERVE

    def needed(self, running: Sequence[Extent], joining: Sequence[Extent], held: int = 0) -> int:
        """Upper bound in bytes for these rows, all padded to the longest, where `held` are allocated already.

        Where more has to be allocated, one layer at a time exists twice.
        """
        rows = [*running, *joining]
        if not rows:
            return 0
        return self._needed(len(rows), Extent(0, 0).covering(rows), held) + self._reading(joining)

    def _needed(self, rows: int, longest: Extent, held: int) -> int:
        kept = rows * (longest.tokens + longest.following) * self.token_bytes
        return max(held, kept + kept // self.layers) + rows * self.score_bytes

    def most(self, joining: Sequence[Extent], held: int) -> int:
        """Tokens that may be allocated while these rows join."""
        return max(0, self.room(held) - self._reading(joining)) * self.layers // (self.token_bytes * (self.layers + 1))

    def _reading(self, joining: Sequence[Extent]) -> int:
        """Bytes of activations while the prompts of these rows are read."""
        return len(joining) * max((row.tokens for row in joining), default=0) * self.prompt_bytes

    def room(self, held: int) -> int:
        """Bytes that the batch may take in all; it holds `held` of them already."""
        room = self.limit
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            on_device = held + free + unused - int(self.reserve * total)
            room = on_device if room is None else min(room, on_device)
        assert room is not None
        return room

    def admitted(self, running: Sequence[Extent], waiting: Sequence[Extent], held: int) -> int:
        """Number of waiting rows, in order, that fit beside the running ones."""
        room, rows, longest, prompt = self.room(held), len(running), Extent(0, 0).covering(running), 0
        for number, one in enumerate(waiting, start=1):
            longest, prompt = longest.covering([one]), max(prompt, one.tokens)
            if self._needed(rows + number, longest, held) + number * prompt * self.prompt_bytes > room:
                return number - 1
        return len(waiting)

    def ran_out(self) -> None:
        """Admit less from now on, because the estimate was too low, and free unused memory."""
        self.reserve = min(MOST_RESERVE, 2 * self.reserve)
        if self.limit is not None:
            self.limit = int(0.9 * self.limit)
        release()


def release() -> None:
    """Return unused memory to the device."""
    gc.collect()  # an exception's traceback keeps tensors alive in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in OUT_OF_MEMORY_TEXTS)
