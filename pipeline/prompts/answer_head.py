"""A task's answer head: how probable each answer is that recurs in its training samples, by a sample's routing keys.

The decoder has to spell an answer that a linear classifier would only have to name. The head is that classifier: a
ridge regression of the known answers on features of the keys, solved in closed form, as the last layer of RanPAC (arXiv
2307.02251) is for classes. Its probabilities and the decoder's are multiplied at every token (`Weighing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.keys import in_parts
from pipeline.errors import UserError
from pipeline.prompts.answer_mix import Mix
from pipeline.prompts.answer_tree import AnswerTree, Weighing
from pipeline.prompts.calibration import minimum
from pipeline.prompts.routers.kept_keys import picked, sampled_rows
from pipeline.prompts.routers.key_features import side_by_side
from pipeline.prompts.routers.ridge import projection

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys, Keys
    from pipeline.data.selection import Selection
    from pipeline.prompts.routers.states import State, States

ANSWERS = "answers."  # how the names of a head's tensors begin in a task's state
TOKENS, CENTRE, SCALE = f"{ANSWERS}tokens", f"{ANSWERS}centre", f"{ANSWERS}scale"
WEIGHTS, BIAS, MIX = f"{ANSWERS}weights", f"{ANSWERS}bias", f"{ANSWERS}mix"
TENSORS = (TOKENS, CENTRE, SCALE, WEIGHTS, BIAS, MIX)
WIDTH, SEED = 1000, 0  # random features, the same on every machine
FITTED = 1 << 13  # most samples that a head is fitted to
AT_ONCE = 1 << 12
PENALTIES = (0.01, 0.1, 1.0, 3.0, 10.0)  # as shares of the features' mean variance
# A key's direction in which a task's samples hardly differ counts no more than this share of the typical one. The
# other bound is of a unit key's component: float16 and batches of another size move it by less than a tenth of that.
LEAST_SHARE, LEAST = 0.1, 1e-3


@dataclass(frozen=True)
class AnswerHead:
    """The head of one task, in float32 on the CPU."""

    tokens: tuple[tuple[int, ...], ...]  # of each of C answers, with the end token
    centre: Tensor  # [2 K + 1] of the keys side by side
    scale: Tensor  # [2 K + 1]
    weights: Tensor  # [F, C]
    bias: Tensor  # [C]
    mix: Mix

    @classmethod
    def of(cls, state: State) -> AnswerHead | None:
        """The head in a task's state; None where it has none."""
        if TOKENS not in state:
            return None
        tokens = tuple(tuple(t for t in row if t >= 0) for row in state[TOKENS].long().tolist())
        centre, scale, weights, bias = (state[name].float().cpu() for name in (CENTRE, SCALE, WEIGHTS, BIAS))
        return cls(tokens, centre, scale, weights, bias, Mix(*state[MIX].double().tolist()))

    @property
    def state(self) -> dict[str, Tensor]:
        """What a task's state has of the head."""
        longest = max(map(len, self.tokens))
        padded = [[*row, *[-1] * (longest - len(row))] for row in self.tokens]
        return {
            TOKENS: torch.tensor(padded, dtype=torch.float32),  # exact for every vocabulary below 2^24
            CENTRE: self.centre,
            SCALE: self.scale,
            WEIGHTS: self.weights,
            BIAS: self.bias,
            MIX: torch.tensor(self.mix, dtype=torch.float32),
        }

    def log_probabilities(self, keys: Keys) -> Tensor:
        """Of each known answer to B samples [B, C]."""
        return torch.log_softmax(features(keys, self.centre, self.scale) @ self.weights + self.bias, dim=1)

    def weighing(self, keys: Keys) -> list[Weighing]:
        """What multiplies the decoder's probabilities, for each of B samples."""
        return [Weighing(self._tree, row.numpy(), self.mix) for row in self.log_probabilities(keys)]

    @cached_property
    def _tree(self) -> AnswerTree:
        return AnswerTree(self.tokens)


class AnswerHeads:
    """The heads of a pool's tasks, for samples with their modules."""

    def __init__(self, states: States, keys: AnyKeys, selection: Selection) -> None:
        """The samples of `keys` [N], whose modules are in the `selection`."""
        self._heads = states.once("answer heads", lambda: [AnswerHead.of(state) for state in states])
        self._keys, self._selection = keys, selection

    def weighing(self, samples: Sequence[int]) -> list[Weighing | None]:
        """For each of these samples that of its module's task; None without a module, and where the task has no head.

        Of several modules it is the one with the largest weight, of equal ones the last, which routing ranked first.
        """
        found: list[Weighing | None] = [None] * len(samples)
        if not any(self._heads):
            return found
        rows = torch.as_tensor(samples, dtype=torch.long)
        of_task: dict[int, list[int]] = {}
        for place, modules in enumerate(self._selection.rows(rows).listed()):
            if modules:
                number, _ = max(reversed(modules), key=lambda module: module[1])
                of_task.setdefault(number, []).append(place)
        for number, places in of_task.items():
            head = self._heads[number]
            if head is not None:
                made = head.weighing(picked(self._keys, rows[places]))
                for place, weighing in zip(places, made, strict=True):
                    found[place] = weighing
        return found


def has_heads(states: Sequence[State]) -> bool:
    """Whether a task's state has an answer head."""
    return any(TOKENS in state for state in states)


def head_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an answer head in a task's state."""
    return {name: value for name, value in state.items() if name.startswith(ANSWERS)}


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task's state without the tensors of its answer head."""
    return {name: value for name, value in state.items() if not name.startswith(ANSWERS)}


def sound_head(state: State) -> bool:
    """Whether the tensors of a task's answer head, where it has any, are those of one head; they are finite."""
    head = head_of(state)
    if not head:
        return True
    if head.keys() != set(TENSORS) or not all(value.is_floating_point() for value in head.values()):
        return False
    tokens, centre, scale, weights, bias, mix = (head[name] for name in TENSORS)
    if tokens.ndim != 2 or not tokens.numel() or centre.ndim != 1:
        return False
    shapes = (len(centre),), (len(centre) + WIDTH, len(tokens)), (len(tokens),), (len(Mix()),)
    if any(value.shape != shape for value, shape in zip((scale, weights, bias, mix), shapes, strict=True)):
        return False
    # Each row has at least one token, and its padding (-1) comes after the tokens.
    given = tokens >= 0
    filled = bool((tokens == tokens.round()).all() and given[:, 0].all() and (given[:, :-1] | ~given[:, 1:]).all())
    return filled and bool((scale > 0).all() and (mix[:-1] >= 0).all())


def require_fitting_heads(states: States, names: Sequence[str], vocabulary: int, width: int) -> None:
    """Raise UserError where a head has tokens that are not in the `vocabulary`, or reads keys of another `width`."""
    for name, state in zip(names, states, strict=True):
        if TOKENS not in state:
            continue
        largest, read = int(state[TOKENS].max()), len(state[CENTRE])
        if largest >= vocabulary or read != 2 * width + 1:
            raise UserError(
                f"The answer head of '{name}' has tokens up to {largest} and reads {read} numbers of a sample's keys; "
                f"expected tokens below {vocabulary}, as the model has them, and {2 * width + 1} numbers. Get the "
                "adapter again, or export the run again."
            )


def features(keys: Keys, centre: Tensor, scale: Tensor) -> Tensor:
    """Features [B, F] of keys: both unit keys, moved and scaled by the task's, and random features of these."""
    plain = (side_by_side(keys) - centre) / scale / len(centre) ** 0.5
    return torch.cat([plain, torch.relu(plain @ projection(len(centre), WIDTH, SEED)) * (2.0 / WIDTH) ** 0.5], dim=1)


def fit_head(keys: AnyKeys, tokens: Sequence[Sequence[int]], answers: Tensor) -> AnswerHead:
    """The head of a task, in closed form, whose `mix` is not fitted yet.

    Args:
        keys: of n samples.
        tokens: of C answers, at least two.
        answers: [n] which of these each sample has.
    """
    rows = sampled_rows(len(answers), FITTED)
    answers = answers[rows]
    some = picked(keys, rows)
    plain = side_by_side(some)
    centre, deviation = plain.mean(0), plain.std(0)
    typical = float(deviation.square().mean().sqrt())
    scale = deviation.clamp_min(max(LEAST_SHARE * typical, LEAST))
    made = torch.cat([features(part, centre, scale) for part in in_parts(some, AT_ONCE)])
    targets = torch.nn.functional.one_hot(answers, len(tokens)).float()
    share = targets.mean(0)

    def judged(alone: Tensor) -> tuple[float, float]:
        return _calibrated(alone - share, share, answers)

    weights, middle, (_, rate) = _ridge(made, targets, judged)
    # Where the keys tell nothing the rate is 0, and the probabilities are the answers' shares.
    return AnswerHead(
        tuple(map(tuple, tokens)), centre, scale, rate * weights, share.log() - rate * (middle @ weights), Mix()
    )


def _calibrated(differences: Tensor, share: Tensor, answers: Tensor) -> tuple[float, float]:
    """The log-loss of softmax(log share + rate differences) on answers [n], and the rate >= 0 that minimises it.

    Of scores [n, C] minus the answers' shares [C]. The loss is convex in the rate. Where all samples are told apart the
    rate would be infinite, so each sample counts as one of another answer with the probability 1 / (n + 2), as in
    Platt's scaling (Platt 1999, section 2.2).
    """
    doubt = 1.0 / (len(answers) + 2)
    logs, scores = share.double().log(), differences.double()
    own = scores.gather(1, answers[:, None])[:, 0]
    wanted = float(((1.0 - doubt) * own + doubt * (scores * share).sum(1)).mean())

    def slopes(rate: float) -> tuple[float, float]:
        """First and second derivative of the loss."""
        shares = torch.softmax(logs + rate * scores, dim=1)
        mean = (shares * scores).sum(1)
        return float(mean.mean()) - wanted, float(((shares * scores.square()).sum(1) - mean.square()).mean())

    rate = minimum(slopes, 0.0, 1.0, 1e6) if slopes(0.0)[0] < 0.0 else 0.0
    found = (logs + rate * scores).log_softmax(1)
    loss = (1.0 - doubt) * found.gather(1, answers[:, None])[:, 0] + doubt * (found * share).sum(1)
    return -float(loss.mean()), rate


def _ridge(
    features: Tensor, targets: Tensor, judged: Callable[[Tensor], tuple[float, float]]
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Weights [F, C] of a regression, the features' mean [F], and what was judged.

    Of features [n, F] and targets [n, C]; by the eigenvectors of the smaller of the matrices of n and of F. `judged` is
    given the scores [n, C] that the regression without each sample gives it; of `PENALTIES` the one counts whose first
    number is the smallest.
    """
    count, width = features.shape
    middle, share = features.mean(0), targets.mean(0)
    centred, wanted = features - middle, targets - share
    dual = count <= width
    # Products in float32, decomposed in float64, once for all penalties.
    products = (centred @ centred.T if dual else centred.T @ centred).double()
    values, vectors = torch.linalg.eigh(products)
    values, turned = values.clamp_min(0.0).float(), vectors.float() if dual else centred @ vectors.float()
    moments, squares = turned.T @ wanted, turned.square()
    best: tuple[tuple[float, float], Tensor] | None = None
    for penalty in PENALTIES:
        shrunk = 1.0 / (values + max(penalty * float(values.sum()) / width, 1e-12))
        effect = values * shrunk if dual else shrunk
        leverage = (squares @ effect + 1.0 / count).clamp(max=1.0 - 1e-6)[:, None]
        found = judged((turned @ (effect[:, None] * moments) + share - leverage * targets) / (1.0 - leverage))
        if best is None or found[0] < best[0][0]:
            best = found, shrunk
    assert best is not None
    weights = vectors.float() @ (best[1][:, None] * moments)
    return centred.T @ weights if dual else weights, middle, best[0]
