"""Model of a training step's cost on many GPUs: `python -m pipeline.scaling` prints the tables of docs/scaling.md.

Memory is that of `pipeline.planning.memory_plan`. ZeRO-3 gathers all weights once in the forward and once in the
backward pass; in a ring of N ranks every link carries (N - 1) / N of them. With perfect overlap a step takes as long as
the slowest of arithmetic, gathering within nodes and gathering between nodes; without overlap, as long as their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.load import load_recipe
from pipeline.config.train import HPZ, ZERO2, ZERO3
from pipeline.planning.memory_plan import inserted_vectors, plan_memory
from pipeline.planning.plan import GIB, MemoryPlan, Tokens
from pipeline.planning.workload import Workload
from pipeline.ranks.environment import USUAL_NODE

if TYPE_CHECKING:
    from torch import nn

GATHERS = 2  # of every weight per micro-batch: forward, backward
# Operations per parameter and token: 2 forward and 2 backward, since frozen weights need no gradient.
FLOPS_PER_PARAMETER = 4
MICRO_BATCH, KEY_WIDTH = 2, 768
TOKENS = Tokens(image=576, text=128, answer=16, source="assumed")
RANKS = (8, 16, 64, 128, 512)


@dataclass(frozen=True)
class Hardware:
    """Effective (not peak) rates of a cluster."""

    flops: float  # operations per second of one GPU in bfloat16
    within: float  # bytes per second that one GPU receives in all-gathers within a node
    between: float  # bytes per second into one node


# A node of eight GPUs of the 80 GB class: 40 % of 990 TFLOP/s, NVLink's usual bus bandwidth in all-gathers, and a
# network of eight 400 Gb/s ports at half their rate, or of a single 200 Gb/s port.
WIDE = Hardware(flops=4e14, within=3e11, between=2e11)
NARROW = Hardware(flops=4e14, within=3e11, between=2.5e10)


@dataclass(frozen=True)
class Step:
    """Bytes received and operations in one optimizer step with one micro-batch per GPU."""

    within: float  # per GPU, from its own node
    between: float  # per node, from other nodes
    flops: float  # per GPU

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """(with perfect overlap, without any)"""
        parts = (self.flops / hardware.flops, self.within / hardware.within, self.between / hardware.between)
        return max(parts), sum(parts)


def step(weights: float, parameters: float, trained: float, ranks: int, node: int, hpz: bool, tokens: int) -> Step:
    """Return the traffic and operations of a step under ZeRO-3.

    Gradients of trainables are reduced over all ranks and their updated values gathered, also with hpZ.

    Args:
        weights: bytes of the frozen weights.
        parameters: number of frozen parameters.
        trained: bytes of the trainables.
        ranks: number of GPUs.
        node: GPUs per node.
        hpz: whether each node holds a copy of the frozen weights.
        tokens: tokens of a micro-batch.
    """
    nodes = -(-ranks // node)
    group = min(ranks, node) if hpz or nodes == 1 else ranks
    gathered = GATHERS * weights * (group - 1) / group
    exchanged = 2 * trained * (ranks - 1) / ranks
    crosses = nodes > 1
    return Step(
        within=gathered + exchanged,
        between=(0.0 if group <= node else gathered) + exchanged if crosses else 0.0,
        flops=FLOPS_PER_PARAMETER * parameters * tokens,
    )


def models() -> Iterator[tuple[str, nn.Module]]:
    """Models of three sizes on the meta device, from published configurations; nothing is downloaded."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes: dict[str, Any] = {
        "7B": LlamaConfig(vocab_size=32064),
        "13B": LlamaConfig(
            vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        "72B": Qwen2Config(
            vocab_size=152064,
            hidden_size=8192,
            intermediate_size=29568,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
    }
    for name, text in sizes.items():
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **vision),
            text_config=text,
        )
        with torch.device("meta"):
            yield name, LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def plan(work: Workload, model: nn.Module, ranks: int, deepspeed: str) -> MemoryPlan:
    """Return the memory plan of a workload on `ranks` GPUs with `MICRO_BATCH` samples each."""
    train = work.train.model_copy(
        update={"global_batch": MICRO_BATCH * ranks, "micro_batch": MICRO_BATCH, "deepspeed": deepspeed}
    )
    return plan_memory(work.trained_with(train), ranks, model, TOKENS)


def main() -> None:
    """Print the tables."""
    work = Workload.of(load_recipe("coin_llava15_7b"), KEY_WIDTH)
    prompts = inserted_vectors(work)
    tokens = MICRO_BATCH * (TOKENS.image + TOKENS.text + TOKENS.answer + prompts)
    built = list(models())
    print("| model | weights GiB | GPUs | ZeRO-2 GiB | ZeRO-3 GiB | with hpZ GiB | replicas GiB | sharded GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model in built:
        weights = sum(p.nbytes for p in model.parameters())
        for ranks in RANKS:
            plans = [plan(work, model, ranks, file) for file in (ZERO2, ZERO3, HPZ)]
            used = " | ".join(f"{found.training / GIB:.1f}" for found in plans)
            answers = [plan(work.evaluated_by(engine), model, ranks, ZERO3) for engine in ("replicas", "sharded")]
            used += " | " + " | ".join(f"{found.evaluation / GIB:.1f}" for found in answers)
            print(f"| {name} | {weights / GIB:.1f} | {ranks} | {used} |")
    print()
    print("| model | GPUs | hpZ | GB per GPU inside the node | GB into each node | s, wide network | s, one port |")
    print("|---|---|---|---|---|---|---|")
    for name, model in built:
        weights, count = sum(p.nbytes for p in model.parameters()), sum(p.numel() for p in model.parameters())
        for ranks in RANKS:
            trained = plan(work, model, ranks, ZERO2).bytes_of("trainables")
            for hpz in (False, True) if ranks > USUAL_NODE else (False,):
                cost = step(weights, count, trained, ranks, USUAL_NODE, hpz, tokens)
                times = " | ".join("{:.2f} - {:.2f}".format(*cost.seconds(hardware)) for hardware in (WIDE, NARROW))
                moved = f"{cost.within / 1e9:.1f} | {cost.between / 1e9:.2f}"
                print(f"| {name} | {ranks} | {'yes' if hpz else 'no'} | {moved} | {times} |")


if __name__ == "__main__":
    main()
