"""The tasks of the probe: 40 that are made to resemble each other, and grids of finer ones.

A task is a population of pictures and a topic, which stands in wordings that all tasks share (`wordings.py`). So either
the topic tells a task from another one or the picture does, and for many pairs only one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from data_prep.nano.scenes import COLOURS, FAMILIES
from pipeline.bench.routing.pictures import COLD, WARM, Cut

FEW, USUAL, MANY = 20, 200, 1000  # training samples of a task


@dataclass(frozen=True)
class ProbeTask:
    """A task: where its pictures and its topic come from, and how many training samples it has at most.

    `twin` names the task that it resembles most, and `differs` says what tells them apart.
    """

    name: str
    pictures: Cut | None  # None: questions without a picture
    topic: str
    train: int = USUAL
    without: float = 0.0  # share of the questions that have no picture
    twin: str | None = None
    differs: str = ""


def _pair(
    stem: str, topic: str, family: str, attribute: str, halves: dict[str, tuple[object, ...]], train: int = USUAL
) -> Iterator[ProbeTask]:
    """Two tasks with the same question about different pictures of one family."""
    first, second = halves
    for name, other in ((first, second), (second, first)):
        cut = Cut(family, {attribute: halves[name]})
        yield ProbeTask(f"{stem}-{name}", cut, topic, train, twin=f"{stem}-{other}", differs=f"pictures: {attribute}")


def _asked(family: str, pictures: str, topics: dict[str, str], train: int = USUAL) -> Iterator[ProbeTask]:
    """Tasks about the same pictures; the first two of them are each other's twin."""
    names = list(topics)
    for name, topic in topics.items():
        twin = names[1] if name == names[0] else names[0]
        yield ProbeTask(f"{pictures}-{name}", Cut(family), topic, train, twin=f"{pictures}-{twin}", differs="topic")


BACKGROUNDS: dict[str, tuple[object, ...]] = {"dark": ("dark",), "light": ("light",)}
INKS: dict[str, tuple[object, ...]] = {"warm": WARM, "cold": COLD}
HALVES: dict[str, tuple[object, ...]] = {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}

HARD: tuple[ProbeTask, ...] = (
    *_asked("shapes", "shapes", {"colour": "colour of the {shape}", "paint": "paint of the {shape}"}, MANY),
    *_asked("shapes", "shapes", {"box": "box of the {thing}", "place": "place of the {thing}"}),
    *_asked("shapes", "shapes", {"count": "number of things", "count-of": "number of {colour} things"}),
    *_asked("shapes", "shapes", {"shape": "shape of the {colour} thing", "kind": "kind of the {colour} thing"}, FEW),
    *_pair("crowd", "size of the crowd", "shapes", "things", {"few": (1, 2), "many": (4, 5)}),
    *_pair("alone", "point", "shapes", "ink", INKS),
    *_asked("digit", "digits", {"digit": "digit", "number": "number"}, MANY),
    *_pair("half", "value", "digit", "digit", HALVES),
    *_pair("parity", "figure", "digit", "digit", {"even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)}),
    *_pair("pen", "hand", "digit", "ink", INKS),
    *_pair("scan", "reading", "digit", "digit", {"three": (3,), "eight": (8,)}, FEW),
    *_asked("text", "text", {"letters": "letters", "spelling": "spelling"}, MANY),
    *_pair("length", "text", "text", "letters", {"two": (2,), "three": (3,)}),
    *_pair("print", "hand", "text", "ink", INKS),
    *_asked("chart", "chart", {"tallest": "tallest bar", "shortest": "shortest bar"}, MANY),
    *_pair("bars", "chart", "chart", "bars", {"three": (3,), "five": (5,)}),
    *_pair("peak", "value", "chart", "tallest", INKS),
    *_pair("slide", "point", "chart", "background", BACKGROUNDS, FEW),
    ProbeTask("asked-colour", None, "colour of the {shape}", twin="shapes-colour", differs="no picture"),
    ProbeTask("asked-count", None, "number of things", FEW, twin="shapes-count", differs="no picture"),
    ProbeTask("ink-digits", Cut("digit"), "colour of the ink", twin="ink-text", differs="pictures: family"),
    ProbeTask("ink-text", Cut("text"), "colour of the ink", without=0.5, twin="ink-digits", differs="pictures: family"),
)

# The populations of the grids, family by family; no picture is in two of them. A network fitted on many pictures tells
# 97.7 % of them apart by their keys, digits' halves 82 to 98 %, all others 98 and more. Cuts by single digits, by three
# or four shapes and by most backgrounds are told apart less.
_CELLS: dict[str, dict[str, dict[str, tuple[object, ...]]]] = {
    "digit": {f"{ink}-{half}": {"ink": (ink,), "digit": HALVES[half]} for ink, half in product(COLOURS, HALVES)},
    "text": {f"{ink}-{count}": {"ink": (ink,), "letters": (count,)} for ink, count in product(COLOURS, (2, 3))},
    "chart": {f"{top}-{bars}": {"tallest": (top,), "bars": (bars,)} for top, bars in product(COLOURS, (3, 4, 5))},
    "shapes": {
        **{ink: {"ink": (ink,)} for ink in COLOURS},  # of a single shape
        **{str(count): {"things": (count,)} for count in (2, 5)},
    },
}
TOPICS = (
    *("number of things", "number of parts", "colour", "paint", "shape", "kind", "box", "place", "letters"),
    *("spelling", "digit", "figure", "tallest bar", "shortest bar", "point", "value", "hand", "size of the crowd"),
)
SIZES = (128, 128, 60, 256, FEW, 128, 60)  # training samples of a grid's tasks, in turn


def cells() -> list[tuple[str, Cut]]:
    """The populations of the grids with their names; the families take turns."""
    rounds = range(max(map(len, _CELLS.values())))
    lists = {family: list(found.items()) for family, found in _CELLS.items()}
    turns = [(family, *lists[family][turn]) for turn in rounds for family in FAMILIES if turn < len(lists[family])]
    return [(f"{family}-{name}", Cut(family, where)) for family, name, where in turns]


MOST = len(TOPICS) * (1 + sum(map(len, _CELLS.values())))


def grid(count: int) -> list[ProbeTask]:
    """`count` tasks of a grid of populations and topics: every task shares its pictures and its question with others.

    The last population has no pictures. At most `MOST` tasks.
    """
    across = min(len(TOPICS), max(2, round(count**0.5)))
    down = -(-count // across)
    populations: list[tuple[str, Cut | None]] = [*cells()[: down - 1], ("no-picture", None)]
    made = []
    for row, (where, pictures) in enumerate(populations):
        for column, topic in enumerate(TOPICS[:across]):
            name = f"{where}-{topic.replace(' ', '-')}"
            made.append(ProbeTask(name, pictures, topic, SIZES[(row + column) % len(SIZES)]))
    return made[:count]


def probe_tasks(count: int) -> list[ProbeTask]:
    """The tasks of a probe: of `HARD` as many pairs of twins as are needed, above that a grid; at most `MOST` tasks."""
    if count > len(HARD):
        return grid(count)
    pairs = -(-count // 2)
    first = [2 * (number * len(HARD) // 2 // pairs) for number in range(pairs)]
    return [task for place in first for task in HARD[place : place + 2]][:count]
