"""The skills (questions about a scene), wordings and answer formats on which the embedded model is trained.

The embedded tasks (tasks.py) use the same skills, but with wordings and formats that do not occur here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from data_prep.nano.scenes import COLOURS, NUMBERS, SHAPES, SIZE, Scene, Thing

UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class Ask:
    """A question about a scene: its skill, the words for its subject ("" for none), and the plain answer."""

    skill: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Format:
    """The format of an answer: prefix, opening bracket, answer in a case, closing bracket, suffix."""

    prefix: str = ""
    case: str = "lower"
    wrap: str = ""
    suffix: str = ""

    def apply(self, answer: str) -> str:
        cased = {"lower": answer.lower(), "upper": answer.upper(), "title": answer.capitalize()}[self.case]
        opening, closing = (self.wrap[0], self.wrap[-1]) if self.wrap else ("", "")
        return f"{self.prefix}{opening}{cased}{closing}{self.suffix}"


PLAIN = Format()
PREFIXES = ("", "it is ", "answer: ", "i see ", "that is ", "result: ")
CASES = ("lower", "upper", "title")
WRAPS = ("", "**", "[]", "()", "<>", "{}", '""')
SUFFIXES = ("", ".", "!", ";")
# The formats of the six tasks. The base model is trained on none of them, in any case and for any skill.
TASK_FORMATS = {
    "Colours": Format("", "upper", "**", ""),
    "Digits": Format("answer: ", "lower", "", "."),
    "Count": Format("", "title", "[]", "!"),
    "Words": Format("i see ", "upper", "<>", ""),
    "Charts": Format("that is ", "lower", "", ";"),
    "Boxes": Format("", "lower", "[]", ""),
}
_HELD_OUT = {(f.prefix, f.wrap, f.suffix) for f in TASK_FORMATS.values()}
BASE_FORMATS = tuple(
    Format(prefix, case, wrap, suffix)
    for prefix, case, wrap, suffix in product(PREFIXES, CASES, WRAPS, SUFFIXES)
    if (prefix, wrap, suffix) not in _HELD_OUT
)

WORDINGS = {
    "colour_of": ("what colour is the {s}?", "which colour does the {s} have?", "tell me the colour of the {s}."),
    "shape_of": ("what shape is {s}?", "which shape is the {s} one?", "tell me the shape of the {s} thing."),
    "count_all": ("how many things are there?", "count all the things.", "what is the number of objects?"),
    "count_of": ("how many {s} things are there?", "count the {s} ones.", "what is the number of {s} objects?"),
    "box_of": ("give the box of the {s}.", "where is the {s}? answer with a box.", "box of the {s}?"),
    "digit": ("which digit is this?", "what number is written by hand?", "tell me the digit.", "read the number."),
    "ink": ("what is the colour of the ink?", "which colour is the writing?", "in what colour is it written?"),
    "letters": ("what letters are these?", "read the text.", "which text is written?", "spell the letters."),
    "letter_count": ("how many letters are there?", "count the letters.", "what is the number of letters?"),
    "tallest": ("which bar is the tallest?", "what colour is the highest bar?", "the colour of the longest bar?"),
    "shortest": ("which bar is the shortest?", "what colour is the lowest bar?", "the colour of the smallest bar?"),
    "bar_count": ("how many bars are there?", "count the bars.", "what is the number of bars in the chart?"),
}
SKILLS = tuple(WORDINGS)
# Words without information on the skill; the base model is trained to ignore them.
FILLER = (
    "the a this that image picture here there please now then you me it one word look say give name write "
    "note down show shown shows what which where how who answer about for of on in at to with by from as "
    "is are was be has have does do can could would should tell report state describe mark used only just "
    "well good new old big large small tight near far side way part line point group paint painted frame "
    "framed crowd reading stands out sum up thing things seen see take find put down short full many much "
    "all any some and or not but if when so up over under between left right "
).split()


def _unique(things: list[Thing], key: Callable[[Thing], str]) -> dict[str, Thing]:
    seen: dict[str, list[Thing]] = {}
    for thing in things:
        seen.setdefault(key(thing), []).append(thing)
    return {name: found[0] for name, found in seen.items() if len(found) == 1}


def box_text(box: tuple[int, int, int, int]) -> str:
    """A box in percent of the image's side, as "25,33,58,75" (left, top, right, bottom)."""
    return ",".join(str(round(100 * v / SIZE)) for v in box)


def _shape_asks(scene: Scene, rng: np.random.Generator) -> Iterator[Ask]:
    things = scene.things
    by_shape, by_colour = _unique(things, lambda t: t.shape), _unique(things, lambda t: t.colour)
    both = _unique(things, lambda t: f"{t.colour} {t.shape}")
    absent_shapes = [s for s in SHAPES if all(t.shape != s for t in things)]
    absent_colours = [c for c in COLOURS if all(t.colour != c for t in things)]
    for shape, thing in by_shape.items():
        yield Ask("colour_of", shape, thing.colour)
    for colour, thing in by_colour.items():
        yield Ask("shape_of", colour, thing.shape)
    if absent_shapes and rng.random() < 0.4:
        yield Ask("colour_of", str(rng.choice(absent_shapes)), UNANSWERABLE)
    if absent_colours and rng.random() < 0.4:
        yield Ask("shape_of", str(rng.choice(absent_colours)), UNANSWERABLE)
    yield Ask("count_all", "", NUMBERS[len(things)])
    for names, field in ((COLOURS, "colour"), (SHAPES, "shape")):
        present = sorted({getattr(t, field) for t in things})
        name = str(rng.choice(present)) if rng.random() < 0.85 else str(rng.choice(list(names)))
        yield Ask("count_of", name, NUMBERS[sum(getattr(t, field) == name for t in things)])
    for name, thing in both.items():
        yield Ask("box_of", name, box_text(thing.box))


def asks(scene: Scene, rng: np.random.Generator) -> list[Ask]:
    """All questions about a scene; subjects that are absent or counted are drawn from `rng`."""
    if scene.family == "shapes":
        return list(_shape_asks(scene, rng))
    if scene.family == "digit":
        digit = scene.digit or 0
        return [Ask("digit", "", NUMBERS[digit]), Ask("ink", "", scene.colour or "")]
    if scene.family == "text":
        text = (scene.letters or "").lower()
        return [
            Ask("letters", "", text),
            Ask("letter_count", "", NUMBERS[len(text)]),
            Ask("ink", "", scene.colour or ""),
        ]
    ranked = sorted(scene.things, key=lambda t: t.box[1])
    return [
        Ask("tallest", "", ranked[0].colour),
        Ask("shortest", "", ranked[-1].colour),
        Ask("bar_count", "", NUMBERS[len(ranked)]),
    ]


def caption(scene: Scene) -> str:
    """A description of the scene, for the contrastive training of the CLIP."""
    if scene.family == "shapes":
        return " and ".join(f"a {t.colour} {t.shape}" for t in scene.things)
    if scene.family == "digit":
        return f"the digit {NUMBERS[scene.digit or 0]} written in {scene.colour}"
    if scene.family == "text":
        return f"the letters {scene.letters} in {scene.colour}"
    ranked = sorted(scene.things, key=lambda t: t.box[1])
    return f"a chart with {NUMBERS[len(ranked)]} bars, {ranked[0].colour} is the tallest"
