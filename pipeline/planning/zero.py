"""Memory that DeepSpeed uses per rank at each ZeRO stage: weights, gathered weights, trainables, gradients, optimizer.

After Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054),
section 5. Exact to padding, but for the gathered window, of which it is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.planning.plan import FLOAT32

SIZES = {"fp32": FLOAT32, "fp16": 2, "bf16": 2}  # bytes, by DeepSpeed's names


@dataclass(frozen=True)
class Zero:
    """The ZeRO settings of a DeepSpeed configuration and the number of ranks; sizes are bytes of one element."""

    settings: Any  # DeepSpeed's object, with its defaults
    ranks: int
    element: int  # of the frozen weights
    accumulated: int  # of accumulated gradients
    sent: int  # of gradients in communication

    @classmethod
    def of(cls, config: dict[str, Any], ranks: int, element: int) -> Zero:
        """Read a DeepSpeed configuration."""
        from deepspeed.runtime.zero.config import get_zero_config  # deferred: importing DeepSpeed takes seconds

        accumulated = SIZES.get(str((config.get("data_types") or {}).get("grad_accum_dtype")), element)
        sent = SIZES.get(str(config.get("communication_data_type")), element)
        return cls(get_zero_config(config), ranks, element, accumulated, sent)

    @property
    def stage(self) -> int:
        """The ZeRO stage: 0 to 3."""
        return int(self.settings.stage)

    def frozen(self, sizes: list[int], buffers: int) -> tuple[int, str]:
        """Bytes of frozen parameters of these sizes and of the buffers, and a note for the memory plan."""
        zero, ranks, element = self.settings, self.ranks, self.element
        count = f"{in_words(sum(sizes))} frozen parameters"
        if self.stage < 3:
            return sum(sizes) * element + buffers, count
        if _on_host(zero.offload_param):
            return buffers, f"{count}, kept in the host's memory"
        held = sum(_share(size, ranks) for size in sizes) + self._resident(sizes)
        note = f"{count}, 1/{ranks} on each"
        node = int(zero.zero_hpz_partition_size)
        if node > 1:  # hpZ: a second copy, partitioned within each node (ZeRO++, arXiv 2306.10209, section 3.2)
            held += sum(_share(size, node) for size in sizes)
            note += f" and 1/{node} again for gathering within a node"
        return held * element + buffers, note

    def trained(self, groups: list[list[int]], states: int) -> tuple[int, int, int]:
        """(trainables, gradients, optimizer state) in bytes.

        Args:
            groups: Sizes of the trained parameters, by optimizer group.
            states: Float32 values of optimizer state per parameter: 2 for Adam, 1 for SGD with momentum.
        """
        zero, ranks, element, stage = self.settings, self.ranks, self.element, self.stage
        count = sum(map(sum, groups))
        if stage == 0:
            masters = 0 if element == FLOAT32 else FLOAT32
            # bfloat16 gradients are converted to float32 for the step.
            return count * element, count * (element + masters), count * (masters + states * FLOAT32)
        accumulated, bucket = self.accumulated, int(zero.reduce_bucket_size) * self.sent
        if stage < 3:
            # A group is one flat buffer, padded so that every rank's partition is aligned to 4 bytes.
            padded = [_share(sum(group), 2 * ranks) * 2 * ranks for group in groups]
            part = sum(padded) // ranks
            trainables, reduced = sum(padded) * element, part if stage == 2 else count
            buffers = bucket * (2 if zero.overlap_comm else 1) if zero.contiguous_gradients else 0
            optimizer = part * (1 + states) * FLOAT32
            gradients = count * element + reduced * accumulated + part * FLOAT32 * (element != FLOAT32) + buffers
        else:
            part = sum(_share(size, ranks) for group in groups for size in group)
            trainables = (part + sum(self._resident(group) for group in groups)) * element
            optimizer = part * (1 + states) * FLOAT32
            step = max(sum(_share(size, ranks) for size in group) for group in groups) * FLOAT32 * (element != FLOAT32)
            gradients = count * element + part * accumulated + step + (bucket if zero.contiguous_gradients else 0)
        return trainables, gradients, 0 if _on_host(zero.offload_optimizer) else optimizer

    def window(self, frozen: list[int], fetched: list[int], trained: list[int]) -> tuple[int, str]:
        """Upper bound in bytes of the parameters that ZeRO-3 holds gathered at once, and a note for the memory plan.

        DeepSpeed gathers the current module, a decoder layer as one. It keeps parameters that are used again within
        max_reuse_distance, which at the end of the forward pass are the last layers. It prefetches parameters until
        the prefetch bucket is full, as long as fewer than max_live_parameters are gathered, and does not release those
        prefetched for the backward pass (partitioned_param_coordinator.py, `_fetch_sub_module_impl`,
        `__params_to_release`). Trainables are outside of the layers and stay gathered. With several ranks a gathered
        module exists twice for a moment: as received and as parameters.

        Args:
            frozen: Sizes of the frozen parameters.
            fetched: Sizes of the units of gathering, see `ModelShape.fetched`.
            trained: Sizes of the trained parameters.
        """
        zero, element = self.settings, self.element
        if self.stage < 3:
            return 0, "nothing is gathered"
        gathered = [size for size in [*frozen, *trained] if size > int(zero.param_persistence_threshold)]
        if not gathered:
            return 0, "no weight is partitioned"
        layer, bucket, limit = max(fetched), int(zero.prefetch_bucket_size), int(zero.max_live_parameters)
        kept = int(zero.max_reuse_distance)
        live = kept + layer + sum(trained)
        if bucket and live < limit:
            live = min(live + layer + bucket, limit) + max(gathered)
        copied = layer if self.ranks > 1 else 0
        if live >= sum(gathered):
            return (sum(gathered) + copied) * element, "at most: all weights"
        note = f"at most: layers of {in_words(layer)}, {in_words(kept)} kept for reuse, prefetched"
        return (live + copied) * element, note

    def _resident(self, sizes: list[int]) -> int:
        """Elements of small parameters, which DeepSpeed keeps gathered besides their partitions."""
        return sum(size for size in sizes if size <= int(self.settings.param_persistence_threshold))


def _on_host(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) not in ("none", "None")


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def in_words(number: int) -> str:
    """A number with three significant digits and its unit: 19.9 M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
