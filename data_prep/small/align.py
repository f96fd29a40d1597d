"""Trains the projector through the frozen language model: cross entropy of answers to questions about pictures.

The questions about one picture share the tokens before them: they are branches of one sequence, which do not see each
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.assemble.language import Language
from data_prep.assemble.vision import Classifier
from data_prep.small.drawings import PLACES
from data_prep.small.features import Pictures
from data_prep.small.places import PUSH, Projector, pushed
from data_prep.small.questions import Ask, drawing_asks, pair_asks, photograph_asks

PUSHED = 0.5  # share of photographs that are pushed to a random class
ASKS = 5  # branches of a sequence
TRIES = 50  # photographs that are looked at for one that can be asked about
KINDS = ("photograph", "pair", "drawing")
SHARES = (0.45, 0.15, 0.4)  # of sequences
PER_STEP = 4  # sequences of an optimizer step
RATE = 1e-3  # highest learning rate
HALVES = (("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Row:
    """A picture's features [places, V] and questions about it."""

    features: Tensor
    asks: list[Ask]


class Rows:
    """Draws pictures and questions, as a function of the seed."""

    def __init__(self, pictures: Pictures, head: Classifier, names: list[str], seed: int) -> None:
        self.pictures, self.head, self.names = pictures, head, names
        self.rng = np.random.default_rng(seed)
        means = torch.cat([maps.float().mean(1) for maps in pictures.photographs.split(64)])
        self.probabilities = head.probabilities(means).double().numpy()

    def draw(self, kind: str | None = None) -> Row:
        """The next picture with up to ASKS questions, of this kind or of a random one.

        Without questions where TRIES photographs of the given kind show nothing of which the tower is sure.
        """
        chosen = kind or str(self.rng.choice(KINDS, p=SHARES))
        make = {"photograph": self._photograph, "pair": self._pair, "drawing": self._drawing}[chosen]
        for _ in range(TRIES):
            row = make()
            if row.asks:
                return row
        return row if kind else self._drawing()

    def _photograph(self) -> Row:
        number = int(self.rng.integers(len(self.probabilities)))
        maps, probabilities = self.pictures.photographs[number], self.probabilities[number]
        if self.rng.random() < PUSHED:
            towards = torch.full((len(maps),), int(self.rng.integers(len(self.names))))
            maps = pushed(maps.float(), towards, self.head, PUSH)
            probabilities = self.head.probabilities(maps.mean(0)).double().numpy()
        return Row(maps, photograph_asks(self.rng, probabilities, self.names, ASKS))

    def _pair(self) -> Row:
        one, other = (int(v) for v in self.rng.integers(len(self.probabilities), size=2))
        tops = [int(self.probabilities[number].argmax()) for number in (one, other)]
        if tops[0] == tops[1] or any(self.probabilities[n, t] < 0.3 for n, t in zip((one, other), tops, strict=True)):
            return Row(self.pictures.photographs[one], [])
        which = int(self.rng.integers(2))
        along = torch.arange(PLACES) < PLACES / 2
        mask = along[None, :].expand(PLACES, PLACES) if which == 0 else along[:, None].expand(PLACES, PLACES)
        joined = torch.where(mask.reshape(-1, 1), self.pictures.photographs[one], self.pictures.photographs[other])
        return Row(joined, pair_asks(self.rng, self.names[tops[0]], self.names[tops[1]], HALVES[which]))

    def _drawing(self) -> Row:
        number = int(self.rng.integers(len(self.pictures.drawings)))
        asks = drawing_asks(self.rng, self.pictures.drawings[number])[:ASKS]
        return Row(self.pictures.drawn[number], asks)


@dataclass(frozen=True)
class Branched:
    """A sequence of shared tokens and branches: `tokens` [N], the decoder's mask and positions, and what to learn.

    Position `at[k]` predicts token `wanted[k]`, which belongs to the branch `owner[k]`.
    """

    tokens: Tensor
    start: int  # position of the image's first feature
    mask: Tensor  # [1, 1, N, N], True where a token is seen
    positions: Tensor  # [1, N]
    at: Tensor
    wanted: Tensor
    owner: Tensor


class Sequences:
    """Makes sequences by a language model's tokenizer and a chat template for images."""

    def __init__(self, tokenizer: Any, template: str, image_token: str, places: int) -> None:
        self.tokenizer, self.template, self.image_token, self.places = tokenizer, template, image_token, places

    def of(self, asks: list[Ask]) -> Branched:
        """The sequence of these questions and answers about one picture."""
        texts = [self._prompt(ask.question).split(self.image_token) for ask in asks]
        before, end = self._numbers(texts[0][0]), self.tokenizer.eos_token_id
        tokens = before + [end] * self.places  # the features' embeddings stand there
        shared = len(tokens)
        owner, positions = [-1] * shared, list(range(shared))
        at: list[int] = []
        wanted: list[int] = []
        owners: list[int] = []
        for number, (ask, (_, behind)) in enumerate(zip(asks, texts, strict=True)):
            question, answer = self._numbers(behind), [*self._numbers(ask.answer), end]
            at += range(len(tokens) + len(question) - 1, len(tokens) + len(question) + len(answer) - 1)
            wanted += answer
            owners += [number] * len(answer)
            tokens += question + answer
            owner += [number] * (len(question) + len(answer))
            positions += range(shared, shared + len(question) + len(answer))
        whose = torch.tensor(owner)
        mask = ((whose[None, :] == -1) | (whose[None, :] == whose[:, None])).tril()
        return Branched(
            torch.tensor(tokens),
            len(before),
            mask[None, None],
            torch.tensor(positions)[None],
            torch.tensor(at),
            torch.tensor(wanted),
            torch.tensor(owners),
        )

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return text

    def _numbers(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Frozen:
    """The frozen language model with its sequences; `dtype` is what it computes in."""

    model: Any
    sequences: Sequences
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(language: Language, sequences: Sequences, dtype: torch.dtype) -> Frozen:
        """A copy of the language model in this precision."""
        return Frozen(language.model.to(dtype).eval().requires_grad_(False), sequences, dtype)

    def logits(self, projector: Projector, row: Row) -> tuple[Tensor, Branched]:
        """Scores [k, V] in float32 of the answers' tokens, and the sequence."""
        made = self.sequences.of(row.asks)
        words = self.model.get_input_embeddings()(made.tokens)
        seen = projector(row.features.float()).to(self.dtype)
        embeddings = torch.cat([words[: made.start], seen, words[made.start + len(seen) :]])[None]
        hidden = self.model.model(
            inputs_embeds=embeddings,
            attention_mask=torch.zeros(made.mask.shape, dtype=self.dtype).masked_fill(
                ~made.mask, torch.finfo(self.dtype).min
            ),
            position_ids=made.positions,
            use_cache=False,
        ).last_hidden_state[0, made.at]
        return self.model.get_output_embeddings()(hidden).float(), made


def align(
    projector: Projector,
    frozen: Frozen,
    rows: Rows,
    minutes: float,
    each: Callable[[int], object] = lambda step: None,
    most: int | None = None,
) -> int:
    """Train the projector through the frozen language model for so long, or `most` steps; returns their number.

    `each` is called after every 50 steps. The rate falls to 0 by a cosine of the time or steps that have passed.
    """
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    started, step, average = time.time(), 0, 0.0
    while (spent := max((time.time() - started) / (60 * minutes), step / most if most else 0)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * 0.5 * (1 + float(np.cos(np.pi * spent)))
        optimizer.zero_grad()
        total = 0.0
        for _ in range(PER_STEP):
            logits, made = frozen.logits(projector, rows.draw())
            loss = F.cross_entropy(logits, made.wanted) / PER_STEP
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        step += 1
        average = total if step == 1 else 0.97 * average + 0.03 * total
        if step % 50 == 0:
            print(f"align step {step} {100 * spent:.0f}% loss {average:.3f}, {time.time() - started:.0f} s", flush=True)
            each(step)
    return step


@torch.no_grad()
def measure(projector: Projector, frozen: Frozen, rows: Rows, count: int) -> dict[str, float]:
    """Percentage of answers all of whose tokens are the most likely ones, given the right ones before, by kind.

    A kind is left out where its photographs show nothing of which the tower is sure.
    """
    shares = {}
    for kind in KINDS:
        right: list[bool] = []
        for _ in range(count):
            row = rows.draw(kind)
            if not row.asks:
                break
            logits, made = frozen.logits(projector, row)
            hit = logits.argmax(-1) == made.wanted
            right += [bool(hit[made.owner == number].all()) for number in made.owner.unique()]
        if right:
            shares[kind] = 100 * float(np.mean(right))
    return shares
