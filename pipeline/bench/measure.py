"""Measures time, floating-point operations and memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

Call = Callable[[], Any]
MIB = 1 << 20
# Dense bfloat16 operations per second by the vendors' data sheets, for utilisation.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class Measured:
    """One variant: medians over the rounds, exact counts of one call."""

    name: str
    seconds: float
    samples: int
    operations: int  # floating-point, of matrix products, convolutions and attention
    attention: int  # of these operations
    peak_bytes: int  # peak of its tensors, including those from before the call
    rounds: tuple[float, ...]
    processor_rounds: tuple[float, ...]  # seconds of processor time, independent of other load on the machine

    @property
    def operations_per_sample(self) -> float:
        """Floating-point operations per sample."""
        return self.operations / self.samples

    def to_json(self, peak: float | None, needed: int | None = None) -> dict[str, Any]:
        """The measurements and, where the device's `peak` operations per second are known, the utilisation.

        `utilisation` counts `needed` operations: those of the call without recomputation (None: it has none);
        `hardware_utilisation` counts all operations.
        """
        numbers = {
            "seconds": round(self.seconds, 4),
            "processor_s": round(statistics.median(self.processor_rounds), 4),
            "samples_per_s": round(self.samples / self.seconds, 3),
            "gflop_per_sample": round(self.operations_per_sample / 1e9, 3),
            "of_it_attention": round(self.attention / self.samples / 1e9, 3),
            "peak_mib": round(self.peak_bytes / MIB, 1),
        }
        if peak is None:
            return numbers
        done = {"utilisation": needed or self.operations, "hardware_utilisation": self.operations}
        return numbers | {name: round(count / self.seconds / peak, 3) for name, count in done.items()}


def operations(call: Call) -> tuple[int, int]:
    """(floating-point operations of a call, those of attention among them).

    The CPU's attention kernel, which torch's counter lacks, is counted like the GPU's.
    """
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _of_tensors(sdpa_flop),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_tensors(sdpa_backward_flop),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    by_operation = counter.get_flop_counts()["Global"]
    attention = sum(count for kernel, count in by_operation.items() if "attention" in str(kernel))
    return counter.get_total_flops(), attention


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Adapt one of torch's formulas, which takes the kernel's tensors, to the interface for custom formulas."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def peak_bytes(call: Call, before: Mapping[str, Any] | None = None, device: str = "cpu") -> int:
    """Peak bytes of tensors during a call, including those in `before`.

    On a CPU the storages of all results of operations are tracked, without temporary memory inside kernels. On a GPU it
    is the allocator's peak, less other tensors than `before` that exist at the beginning (None: all are included).
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        others = 0 if before is None else max(0, torch.cuda.memory_allocated() - held_bytes(before))
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others
    with _Storages() as storages:
        storages.add(before or {})
        call()
    return storages.peak


def held_bytes(value: Any) -> int:
    """Bytes of the storages of all tensors in a structure, each counted once."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Storages(TorchDispatchMode):
    """Tracks live storages: each counts from the operation that created it until it is no longer referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def add(self, value: Any) -> None:
        """Count the storages of all tensors in a structure."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.held)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result


def compare(
    variants: Mapping[str, tuple[Call, int, Callable[[], Mapping[str, Any]]]], rounds: int, device: str = "cpu"
) -> dict[str, Measured]:
    """Measure variants {name: (call, samples, function that returns the tensors it holds)}, interleaved by rounds.

    Operations are counted in the first call and memory in the second, when an optimizer has its moments. Interleaving
    exposes all variants to the same load of the machine; `ratio` takes the median over the rounds.
    """
    counted: dict[str, tuple[int, int]] = {}
    memory: dict[str, int] = {}
    for name, (call, _, held) in variants.items():
        counted[name] = operations(call)
        memory[name] = peak_bytes(call, held(), device)
        tell(f"{name}: {counted[name][0] / 1e9:.2f} GFLOP, {memory[name] / MIB:.0f} MiB at most")
    times: dict[str, list[float]] = {name: [] for name in variants}
    worked: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (call, _, _) in variants.items():
            before = time.process_time()
            times[name].append(seconds(call, device))
            worked[name].append(time.process_time() - before)
            tell(f"{name}: {times[name][-1]:.3f} s")
    return {
        name: Measured(
            name,
            statistics.median(times[name]),
            samples,
            *counted[name],
            memory[name],
            tuple(times[name]),
            tuple(worked[name]),
        )
        for name, (_, samples, _) in variants.items()
    }


def tell(line: str) -> None:
    """Print the progress of a long measurement to stderr, since with --json stdout has one object only."""
    print(line, file=sys.stderr, flush=True)


def seconds(call: Call, device: str = "cpu") -> float:
    """Wall-clock time of a call."""
    with _settled(device):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began


@contextmanager
def _settled(device: str) -> Iterator[None]:
    gc.collect()
    gc.disable()
    if device != "cpu":
        torch.cuda.synchronize()
    try:
        yield
    finally:
        gc.enable()


def ratio(slow: Measured, fast: Measured) -> dict[str, float]:
    """Factors by which `fast` is better, per sample: operations, wall clock (median over the rounds), peak memory."""
    scale = fast.samples / slow.samples

    def by_round(slow: tuple[float, ...], fast: tuple[float, ...]) -> float:
        return round(statistics.median(a / max(b, 1e-9) for a, b in zip(slow, fast, strict=True)) * scale, 2)

    return {
        "operations": round(slow.operations_per_sample / fast.operations_per_sample, 2),
        "without_attention": round((slow.operations - slow.attention) / (fast.operations - fast.attention) * scale, 2),
        "wall_clock": by_round(slow.rounds, fast.rounds),
        "processor_time": by_round(slow.processor_rounds, fast.processor_rounds),
        "peak_memory": round(slow.peak_bytes / fast.peak_bytes, 2),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """The environment that a result depends on: versions and hardware."""
    import transformers

    name = torch.cuda.get_device_name() if device != "cpu" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def peak_rate(device: str, dtype: str) -> float | None:
    """The device's stated bfloat16 operations per second; None where they are not known or do not apply."""
    if device == "cpu" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()
