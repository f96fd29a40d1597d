"""Squared gradients of single training samples, from which a term estimates what matters to a finished stage."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.collate import MicroBatches, collate
from pipeline.ranks.world import sum_over_ranks
from pipeline.runs.session import Session
from pipeline.training.engine import Engine


def mean_squares(engine: Engine, batches: MicroBatches, samples: int, session: Session) -> dict[str, Tensor]:
    """For every trainable the mean over samples of its squared gradient of the log-likelihood of the answer.

    That is the diagonal of the empirical Fisher information, in float32 on the CPU. The gradients are asked of autograd
    and never reach DeepSpeed's buffers. All ranks call it together; each takes its share of the samples, and computes
    as many, the last perhaps with the weight 0, because ZeRO-3 gathers weights by collectives.

    Args:
        engine: with the stage's final values.
        batches: the stage's samples, with their selection of earlier modules.
        samples: how many of them, the first in their order; at most all.
        session: the ranks, and the watchdog, which is told of every sample.
    """
    world, order = session.world, batches.order
    found: list[int] = []
    for number in range(order.batches_per_epoch):
        indices, weights = order.batch(0, number)
        found += indices[weights > 0].tolist()
        if len(found) >= samples:
            break
    found = found[:samples]
    count = -(-len(found) // world.size)
    own = found[world.rank :: world.size]
    sums = {name: torch.zeros(1) for name in engine.trainables}
    for number in range(count):
        session.watchdog.beat(f"gradient of sample {number + 1} of {count}")
        weight = float(number < len(own))
        index = own[number] if weight else found[0]
        batch = collate(batches.examples, [index], [1.0], batches.selection).to(world.device)
        for name, gradient in engine.gradients(engine.module.unlikeliness(batch)).items():
            sums[name] = sums[name] + weight * gradient.float().square().cpu()
    return {name: sum_over_ranks(value.to(world.device)).cpu() / len(found) for name, value in sums.items()}
