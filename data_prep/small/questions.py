"""Questions about pictures and their answers, for aligning the projector.

Photographs have no labels here: the answers are the vision tower's own classes. None of the wordings is one of real6's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.small.drawings import COLORS, SHAPES, Drawing, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SURE = 0.08  # least probability of a class that an answer names
UNLIKELY = 0.002  # most probability of a class that an answer denies
SHORT = (" Answer in one or two words.", " Reply with a short phrase.", " Just name it.", " Keep it short.")


@dataclass(frozen=True)
class Ask:
    """A question about a picture and its answer."""

    question: str
    answer: str


def a(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def photograph_asks(rng: np.random.Generator, probabilities: np.ndarray, names: list[str], count: int) -> list[Ask]:
    """Questions about a photograph by the probabilities [classes] of what it shows; none where nothing is likely."""
    likely = np.flatnonzero(probabilities >= SURE)
    if not len(likely):
        return []
    weights = probabilities[likely] / probabilities[likely].sum()
    unlikely = np.flatnonzero(probabilities < UNLIKELY)
    asks = []
    for number in range(count):
        name = names[int(rng.choice(likely, p=weights))]
        other = names[int(rng.choice(unlikely))]
        kind = number if number < 2 else int(rng.integers(2, 5))
        if kind == 0:
            question = _one(
                rng, "What do you see?", "What is shown here?", "Describe the picture.", "What does this photo show?"
            )
            asks.append(Ask(question, _one(rng, f"{a(name).capitalize()}.", f"The picture shows {a(name)}.")))
        elif kind in (1, 2):
            question = _one(
                rng, "Name the main thing in this photo.", "What is this?", "Which thing is in the picture?"
            )
            asks.append(Ask(question + _one(rng, *SHORT), name))
        elif kind == 3:
            right = rng.random() < 0.5
            asks.append(Ask(f"Does the picture show {a(name if right else other)}?", "Yes" if right else "No"))
        else:
            pair = [name, other] if rng.random() < 0.5 else [other, name]
            asks.append(Ask(f"Is this {a(pair[0])} or {a(pair[1])}?" + _one(rng, "", *SHORT), name))
    return asks


def pair_asks(rng: np.random.Generator, first: str, second: str, sides: tuple[str, str]) -> list[Ask]:
    """Questions about a picture whose two halves, such as left and right, show one thing each."""
    asks = []
    for name, side in ((first, sides[0]), (second, sides[1])):
        asks.append(Ask(f"What is on the {side} side?" + _one(rng, *SHORT), name))
        asks.append(Ask(f"On which side is the {name}?" + _one(rng, *SHORT), side))
    caption = f"{a(first).capitalize()} on the {sides[0]} and {a(second)} on the {sides[1]}."
    return [*asks, Ask(_one(rng, "Describe the picture.", "What do you see?"), caption)]


def drawing_asks(rng: np.random.Generator, drawing: Drawing) -> list[Ask]:
    """All questions about a drawing in a random order."""
    asks = _text_asks(rng, drawing) if drawing.text else _shape_asks(rng, drawing)
    return [asks[k] for k in rng.permutation(len(asks))]


def _text_asks(rng: np.random.Generator, drawing: Drawing) -> list[Ask]:
    return [
        Ask("What does the text say?", drawing.text),
        Ask(_one(rng, "Read the writing.", "Which word or number is printed?"), drawing.text),
        Ask("In what color is the text?" + _one(rng, *SHORT), drawing.ink),
        Ask("What is the background color?" + _one(rng, *SHORT), drawing.ground),
        Ask("Describe the picture.", f'The text "{drawing.text}" in {drawing.ink} on {drawing.ground}.'),
    ]


def _shape_asks(rng: np.random.Generator, drawing: Drawing) -> list[Ask]:
    things = drawing.things
    said = [a(f"{thing.color} {thing.shape}") for thing in things]
    listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    asks = [
        Ask(_one(rng, "Describe the picture.", "What do you see?"), f"{listed.capitalize()} on {drawing.ground}."),
        Ask(_one(rng, "How many shapes are there?", "Count the shapes.") + _one(rng, *SHORT), NUMBERS[len(things)]),
        Ask("What is the background color?" + _one(rng, *SHORT), drawing.ground),
    ]
    for field, all_of, question in (
        ("color", tuple(COLORS), "Is something {} here?"),
        ("shape", SHAPES, "Can you see a {}?"),
    ):
        shown = {getattr(thing, field) for thing in things} | ({drawing.ground} if field == "color" else set())
        right = rng.random() < 0.5
        name = _one(rng, *sorted(shown)) if right else _one(rng, *(name for name in all_of if name not in shown))
        asks.append(Ask(question.format(name), "Yes" if right else "No"))
    for thing in things:
        if sum(other.shape == thing.shape for other in things) == 1:
            asks.append(Ask(f"Which color has the {thing.shape}?" + _one(rng, *SHORT), thing.color))
            asks.append(Ask(f"Where in the picture is the {thing.shape}?" + _one(rng, *SHORT), _where(thing)))
        if sum(other.color == thing.color for other in things) == 1:
            asks.append(Ask(f"Which shape is {thing.color}?" + _one(rng, *SHORT), thing.shape))
    return asks


def _where(thing: Thing) -> str:
    x, y = thing.centre
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return " ".join(word for word in (down, across) if word) or "center"


def _one(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]
