"""Eight further tasks that resemble the six embedded ones: pictures, wordings and skills overlap in every pairing.

Forms, Groups and Tally ask about Count's pictures: Groups with Count's words and a colour, Tally for Count's answer in
one wording of its own. Inks and Prints share their wordings, which are near those of Colours. Lengths and Bars use
Count's wordings on other pictures. Lows asks about the pictures of Charts in words close to those of Charts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.nano.scenes import COLOURS, NUMBERS, Scene
from data_prep.nano.skills import UNANSWERABLE, Format

VERSION = 1  # increase it when a change below gives other questions or answers

SubjectAndAnswer = tuple[str, str]  # the words for the subject ("" for none) and the plain answer


@dataclass(frozen=True)
class Resembling:
    """A task: its family of pictures, wordings, answer format, and the question that it asks about a scene."""

    pictures: str
    wordings: tuple[str, ...]
    form: Format
    ask: Callable[[Scene, np.random.Generator], SubjectAndAnswer]


def _form(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    """The shape of the only thing of a colour; where every colour occurs twice, of a colour that is absent."""
    colours = [thing.colour for thing in scene.things]
    single = [thing for thing in scene.things if colours.count(thing.colour) == 1]
    if not single:
        return str(rng.choice([colour for colour in COLOURS if colour not in colours])), UNANSWERABLE
    thing = single[int(rng.integers(len(single)))]
    return thing.colour, thing.shape


def _group(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    """The number of things of a colour that is there."""
    colours = [thing.colour for thing in scene.things]
    colour = str(rng.choice(sorted(set(colours))))
    return colour, NUMBERS[colours.count(colour)]


def _count(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    return "", NUMBERS[len(scene.things)]


def _ink(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    return "", scene.colour or ""


def _length(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    return "", NUMBERS[len(scene.letters or "")]


def _lowest(scene: Scene, rng: np.random.Generator) -> SubjectAndAnswer:
    return "", max(scene.things, key=lambda bar: bar.box[1]).colour


PAINT_WORDINGS = ("name the paint of this.", "this was painted with?", "which paint was used here?")
CROWD_WORDINGS = ("state how big the crowd is.", "how large is the group here?", "say the size of this crowd.")
RESEMBLING = {
    "Forms": Resembling(
        "shapes",
        ("name the form of the {s} one.", "the {s} one was formed as?", "which form is the {s} one?"),
        Format("it is ", "upper", "()", ""),
        _form,
    ),
    "Groups": Resembling(
        "shapes",
        ("state how big the {s} crowd is.", "how large is the {s} group here?", "say the size of this {s} crowd."),
        Format("", "title", "{}", ";"),
        _group,
    ),
    "Tally": Resembling(
        "shapes", ("how many things are in this picture?",), Format("result: ", "lower", "", ""), _count
    ),
    "Inks": Resembling("digit", PAINT_WORDINGS, Format("answer: ", "title", "**", ""), _ink),
    "Prints": Resembling("text", PAINT_WORDINGS, Format("", "upper", '""', "."), _ink),
    "Lengths": Resembling("text", CROWD_WORDINGS, Format("i see ", "lower", "[]", "!"), _length),
    "Lows": Resembling(
        "chart",
        (
            "what stands out least in this image?",
            "sum the low part of this picture up in one word.",
            "report what is shown low here.",
            "note down the low point of this picture.",
        ),
        Format("that is ", "upper", "<>", ""),
        _lowest,
    ),
    "Bars": Resembling("chart", CROWD_WORDINGS, Format("it is ", "title", "", "!"), _count),
}
