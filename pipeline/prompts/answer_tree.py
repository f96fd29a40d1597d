"""How the probabilities of known answers and those of a decoder's next token are multiplied.

The known answers form a tree of tokens. Where an answer in progress is the beginning of some of them, `Weighing` asks
two questions: whether it goes on as one of them, which the decoder's probability of their next tokens says, and as
which, which decoder and head say together. How much each counts is a `Mix`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from pipeline.prompts.answer_mix import Branch, HeldOut, Mix

LEAST_LOG = -80.0  # of a probability that counts


class AnswerTree:
    """The tokens of known answers as a tree, of which only what answers in progress came to is made."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        """`tokens` of C answers."""
        self._tokens, self._root = tokens, _Node.of(tokens, range(len(tokens)), 0)

    def at(self, so_far: Sequence[int]) -> _Node | None:
        """What is known of the answers that begin so; None where none of them goes on."""
        node = self._root
        for depth, token in enumerate(so_far):
            if node is None or token not in node.behind:
                return None
            if node.behind[token] is None:
                begun = (n for n in node.begun.tolist() if self._tokens[n][depth] == token)
                node.behind[token] = _Node.of(self._tokens, begun, depth + 1)
            node = node.behind[token]
        return node


@dataclass(frozen=True)
class _Node:
    """The known answers with one beginning that go on behind it."""

    begun: npt.NDArray[np.int64]  # [n] their numbers
    next: npt.NDArray[np.int64]  # [m] their next tokens, in ascending order
    places: npt.NDArray[np.int64]  # [n] which of these each has
    behind: dict[int, _Node | None]  # by next token; None: not made yet, or no answer goes on

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], numbers: Iterable[int], length: int) -> _Node | None:
        """That of the answers of these numbers, whose first `length` tokens are the same; None where none goes on."""
        begun = [number for number in numbers if len(tokens[number]) > length]
        if not begun:
            return None
        following, places = np.unique([tokens[number][length] for number in begun], return_inverse=True)
        return cls(np.array(begun), following, places, dict.fromkeys(following.tolist()))


class Weighing:
    """What a head says of one sample, for the decoder of its answer."""

    def __init__(self, tree: AnswerTree, logs: npt.NDArray[np.float32], mix: Mix) -> None:
        """The `tree` of C known answers, the logarithms of their probabilities [C], and how these count."""
        self._tree, self._logs, self._mix = tree, logs, mix

    @classmethod
    def weighed(cls, rows: Sequence[Weighing], so_far: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """The logits [n, V] of the tokens behind those `so_far` of n answers, given the decoder's [n, V].

        Those of a row are the decoder's where no known answer begins so, and else have the same sum of exponentials,
        because rules of generation such as a repetition penalty count logits as they are.
        """
        found = [(place, next_) for place, row in enumerate(rows) if (next_ := row.next(so_far[place])) is not None]
        if not found:
            return scores
        places = [place for place, _ in found]
        mix = torch.tensor([rows[place]._mix for place in places]).to(scores.device)[:, :, None]
        decoder, head, slope, known = (mix[:, place] for place in range(4))
        # Rows of fewer tokens are filled up with their first one, which counts once.
        shape = len(found), max(len(tokens) for _, (tokens, _) in found)
        filled, padded = np.empty(shape, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
        for row, (_, (some, logs)) in enumerate(found):
            filled[row], filled[row, : len(some)], padded[row, : len(logs)] = some[0], some, logs
        tokens, said = torch.from_numpy(filled).to(scores.device), torch.from_numpy(padded).to(scores.device)
        gaps = said.isinf()
        mine = (scores if len(found) == len(rows) else scores[places]).float()
        total = mine.logsumexp(1, keepdim=True)
        own = (mine.gather(1, tokens) - total).clamp_min(LEAST_LOG).masked_fill(gaps, -torch.inf)
        changed = mine.scatter(1, tokens, -torch.inf)
        together = (changed.logsumexp(1, keepdim=True) - total).clamp_min(LEAST_LOG)
        odds = slope * (own.logsumexp(1, keepdim=True) - together) + known
        powers = (decoder * own.masked_fill(gaps, 0.0) + head * said.masked_fill(gaps, 0.0)).masked_fill(
            gaps, -torch.inf
        )
        shares = log_softmax(powers, dim=1) + logsigmoid(odds) + total
        shares = torch.where(gaps, shares[:, :1], shares)
        changed = changed.add_(logsigmoid(-odds) - together).scatter_(1, tokens, shares).to(scores.dtype)
        if len(found) == len(rows):
            return changed
        return scores.index_copy(0, torch.tensor(places, device=scores.device), changed)

    def next(self, so_far: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """The tokens [m] that follow in the known answers which begin so, in ascending order, and what the head says of
        each [m]; None where there is none.

        It is the logarithm of the most probable answer behind it, minus the largest of these. The sum over the answers
        behind it would be the token's probability, but decoding takes one token after the other, and many improbable
        answers with a common beginning would together be preferred to the most probable answer.
        """
        node = self._tree.at(so_far)
        if node is None:
            return None
        most = np.full(len(node.next), -np.inf, dtype=np.float32)
        np.maximum.at(most, node.places, self._logs[node.begun])
        return node.next, np.maximum(most - most.max(), np.float32(LEAST_LOG))


def said_along(weighing: Weighing, answer: Sequence[int], logits: Tensor) -> HeldOut:
    """What decoder and head say along a held-out answer of n tokens, whose logits [n, V] the decoder gave."""
    seen, spelt = list[Branch](), True
    for place, token in enumerate(answer):
        found = None if seen and seen[-1].unknown else weighing.next(answer[:place])
        logs = log_softmax(logits[place].float(), dim=0)
        if found is None:
            spelt = spelt and int(logs.argmax()) == token
            continue
        tokens = torch.from_numpy(found[0]).to(logs.device)
        others = logs.index_fill(0, tokens, -torch.inf)
        together = others.logsumexp(0, keepdim=True)
        said = torch.cat([logs[tokens], together]).clamp_min(LEAST_LOG).double().cpu().numpy()
        right = np.flatnonzero(found[0] == token)
        branch = Branch(
            said,
            found[1].astype(np.float64),
            int(right[0]) if len(right) else len(found[0]),
            float((others.max() - together).clamp_min(LEAST_LOG)),
        )
        spelt = spelt and (not branch.unknown or int(others.argmax()) == token)
        seen.append(branch)
    return HeldOut(seen, spelt)
