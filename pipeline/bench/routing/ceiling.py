"""What keys can tell at all: a network fitted on many samples of each task, which no router has.

Two tasks whose keys are distributed alike are no test of a router. The network is given what a router is not: thousands
of samples per task, labels of all tasks at once, and gradient descent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from pipeline.bench.routing.probe import TaskKeys
from pipeline.data.keys import Keys

WIDTH = 512
EPOCHS, BATCH, RATE = 30, 256, 2e-3


def ceiling(tasks: Sequence[TaskKeys], epochs: int = EPOCHS) -> Tensor:
    """The share [T] of each task's test samples that a network recognises, each task counting the same in training."""
    features, own = _labelled([task.train for task in tasks])
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Linear(features.shape[1], WIDTH), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, len(tasks))),
        )
        weights = 1.0 / torch.bincount(own, minlength=len(tasks)).float()
        _train(network, (features - mean) / spread, own, weights / weights.sum(), epochs)
    network.eval()
    right = []
    with torch.no_grad():
        for number, task in enumerate(tasks):
            found = network((_features(task.test) - mean) / spread).argmax(1)
            right.append((found == number).double().mean())
    return torch.stack(right)


def _train(network: nn.Module, features: Tensor, own: Tensor, weights: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    steps = epochs * -(-len(own) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(own)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(features[rows]), own[rows], weights * len(weights)).backward()
            optimizer.step()
            schedule.step()


def _labelled(parts: Sequence[Keys]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(part.text) for part in parts])
    return torch.cat([_features(part) for part in parts]), torch.repeat_interleave(torch.arange(len(parts)), counts)


def _features(keys: Keys) -> Tensor:
    """Both unit keys and whether there is a picture [N, 2K + 1]."""
    image, text = (normalize(rows.float(), dim=-1) for rows in (keys.image, keys.text))
    return torch.cat([image, text, keys.has_image.float()[:, None]], dim=1)
