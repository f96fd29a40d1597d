"""Generates training batches for the decoder: per row one image, zero to three behaviour sets, and several questions.

A behaviour is a skill and an answer format. It is given not in words but as a set of ten learned vectors directly after
the first token, where prompt sets are inserted later. So the base model is trained to be steered by such sets; where
there are several, the last one decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_prep.nano.scenes import Scene
from data_prep.nano.skills import (
    BASE_FORMATS,
    CASES,
    FILLER,
    PLAIN,
    PREFIXES,
    SKILLS,
    SUFFIXES,
    WORDINGS,
    WRAPS,
    Ask,
    Format,
    asks,
)
from data_prep.nano.vision import SIDE

SET_LENGTH = 10
IMAGE_TOKENS = SIDE * SIDE
# part of a behaviour -> (choices, vectors each)
PARTS = {
    "skill": (len(SKILLS), 4),
    "prefix": (len(PREFIXES), 2),
    "case": (len(CASES), 1),
    "wrap": (len(WRAPS), 2),
    "suffix": (len(SUFFIXES), 1),
}
OFFSETS = dict(zip(PARTS, np.cumsum([0, *(rows * width for rows, width in PARTS.values())]), strict=False))
BEHAVIOUR_ROWS = sum(rows * width for rows, width in PARTS.values())
SET_COUNT_SHARES = (0.52, 0.28, 0.2)  # shares of batches with 1, 2 and 3 sets among those with sets
BRANCHES_PLAIN, BRANCHES_SET = 8, 5  # questions per row at most, without and with sets


def behaviour_rows(skill: str, form: Format) -> np.ndarray:
    """The ten rows of the behaviour table that encode a skill and a format."""
    choice = {
        "skill": SKILLS.index(skill),
        "prefix": PREFIXES.index(form.prefix),
        "case": CASES.index(form.case),
        "wrap": WRAPS.index(form.wrap),
        "suffix": SUFFIXES.index(form.suffix),
    }
    return np.concatenate([OFFSETS[p] + choice[p] * width + np.arange(width) for p, (_, width) in PARTS.items()])


@dataclass
class Batch:
    """Packed rows: a shared prefix per row, then independent question-and-answer branches.

    ids, branch, position [B, T] (branch 0: prefix, -1: padding); sets [B, n, 10] rows of the behaviour table (-1:
    random noise); target [B, T] the next answer token or -100; scene [B]; skills: skill index by row and branch.
    """

    ids: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    target: np.ndarray
    sets: np.ndarray
    scene: np.ndarray
    skills: list[list[int]]


@dataclass
class RowMaker:
    """Makes batches from scenes; caches the token ids of every text."""

    tokenizer: PreTrainedTokenizerFast
    scenes: list[Scene]
    seed: int
    cache: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.asks = [asks(scene, self.rng) for scene in self.scenes]
        self.by_skill: dict[str, list[int]] = {skill: [] for skill in SKILLS}
        for index, found in enumerate(self.asks):
            for skill in {a.skill for a in found}:
                self.by_skill[skill].append(index)
        self.hardness = np.ones(len(SKILLS))
        self.filler = [self.ids(" " + word) for word in FILLER]
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        self.head = [*self.ids("USER: "), *[image] * IMAGE_TOKENS, *self.ids("\n")]
        self.turn = self.ids(" ASSISTANT:")
        self.plain_ids = np.arange(5, len(self.tokenizer))

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def _worded(self, ask: Ask) -> list[int]:
        wordings = WORDINGS[ask.skill]
        return self.ids(wordings[self.rng.integers(len(wordings))].format(s=ask.subject))

    def _salad(self, ask: Ask) -> list[int]:
        """A question without information on the skill: filler words or random tokens around the subject's words."""
        count = int(self.rng.integers(1, 9))
        if self.rng.random() < 0.6:
            words = [self.filler[i] for i in self.rng.integers(len(self.filler), size=count)]
        else:
            words = [[int(i)] for i in self.rng.choice(self.plain_ids, size=count)]
        if ask.subject:
            words.insert(int(self.rng.integers(len(words) + 1)), self.ids(" " + ask.subject))
        return [i for word in words for i in word]

    def _skill(self) -> str:
        return SKILLS[int(self.rng.choice(len(SKILLS), p=self.hardness / self.hardness.sum()))]

    def _decoy(self) -> np.ndarray:
        if self.rng.random() < 0.2:
            return np.full(SET_LENGTH, -1)
        return self._set(
            SKILLS[int(self.rng.integers(len(SKILLS)))], BASE_FORMATS[int(self.rng.integers(len(BASE_FORMATS)))]
        )

    def _set(self, skill: str, form: Format) -> np.ndarray:
        return self.rng.permutation(behaviour_rows(skill, form))

    def _row(
        self, set_count: int, formats: tuple[Format, ...]
    ) -> tuple[int, list[np.ndarray], list[tuple[int, list[int], list[int]]]]:
        skill = self._skill()
        scene = self.by_skill[skill][int(self.rng.integers(len(self.by_skill[skill])))]
        found = [a for a in self.asks[scene] if set_count == 0 or a.skill == skill]
        limit = BRANCHES_SET if set_count else BRANCHES_PLAIN
        if set_count == 0 and len(found) > limit:
            weight = np.array([self.hardness[SKILLS.index(a.skill)] for a in found])
            picked = self.rng.choice(len(found), size=limit, replace=False, p=weight / weight.sum())
        else:
            picked = self.rng.permutation(len(found))[:limit]
            if len(picked) <= limit // 2:
                picked = np.tile(picked, 2)
        form = PLAIN
        if set_count and self.rng.random() > 0.08:
            form = formats[int(self.rng.integers(len(formats)))]
        branches = []
        for index in picked:
            ask = found[int(index)]
            worded = set_count == 0 or self.rng.random() < 0.35
            question = self._worded(ask) if worded else self._salad(ask)
            branches.append((SKILLS.index(ask.skill), question, self.ids(" " + form.apply(ask.answer))))
        sets = [self._decoy() for _ in range(set_count - 1)] + ([self._set(skill, form)] if set_count else [])
        return scene, sets, branches

    def set_count(self, plain_share: float) -> int:
        """Draws the number of sets of the next batch: 0 with probability `plain_share`, else 1 to 3."""
        return 0 if self.rng.random() < plain_share else 1 + int(self.rng.choice(3, p=SET_COUNT_SHARES))

    def batch(self, rows: int, count: int, formats: tuple[Format, ...] = BASE_FORMATS) -> Batch:
        """Draws one batch; all rows have `count` sets, so that their prefixes have the same length."""
        drawn = [self._row(count, formats) for _ in range(rows)]
        prefix = [self.bos, *[0] * (SET_LENGTH * count), *self.head]
        longest = max(sum(len(q) + len(a) for _, q, a in b) + len(b) * (len(self.turn) + 1) for _, _, b in drawn)
        total = len(prefix) + longest
        ids, branch = np.zeros((rows, total), dtype=np.int64), np.full((rows, total), -1)
        position, target = np.zeros((rows, total), dtype=np.int64), np.full((rows, total), -100)
        ids[:, : len(prefix)], branch[:, : len(prefix)] = prefix, 0
        position[:, : len(prefix)] = np.arange(len(prefix))
        for row, (_, _, branches) in enumerate(drawn):
            at = len(prefix)
            for number, (_, question, answer) in enumerate(branches, start=1):
                tokens = [*question, *self.turn, *answer, self.eos]
                end, start = at + len(tokens), at + len(question) + len(self.turn)
                ids[row, at:end], branch[row, at:end] = tokens, number
                position[row, at:end] = len(prefix) + np.arange(len(tokens))
                target[row, start - 1 : end - 1] = tokens[len(tokens) - len(answer) - 1 :]
                at = end
        sets = (
            np.stack([np.stack(s) for _, s, _ in drawn]) if count else np.zeros((rows, 0, SET_LENGTH), dtype=np.int64)
        )
        return Batch(
            ids, branch, position, target, sets, np.array([d[0] for d in drawn]), [[b[0] for b in d[2]] for d in drawn]
        )
