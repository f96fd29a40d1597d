"""Draws docs/architecture.svg: `python docs/architecture_picture.py`; the colours follow the reader's scheme."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 860, 470
STYLE = """
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 14px; fill: #1c2530; text-anchor: middle }
text.head { font-weight: 600 }
text.note { font-size: 12px; fill: #55606e }
rect { fill: #ffffff; stroke: #7b8794; rx: 8px }
rect.page { stroke: none }
rect.frozen { fill: #e4eef8; stroke: #3b6ea5 }
rect.learned { fill: #fdebd0; stroke: #b9770e }
rect.answer { fill: #e3f4e6; stroke: #2f7d3b }
path { fill: none; stroke: #55606e; stroke-width: 1.5; marker-end: url(#tip) }
path.training { stroke-dasharray: 5 4 }
.tip { fill: #55606e; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e8edf3 } text.note { fill: #a9b4c0 }
  rect { fill: #1b222b; stroke: #8895a3 } rect.page { fill: #12161b; stroke: none }
  rect.frozen { fill: #1d3349; stroke: #7fb0e0 }
  rect.learned { fill: #43300f; stroke: #e0a850 }
  rect.answer { fill: #18391f; stroke: #74c283 }
  path { stroke: #a9b4c0 } .tip { fill: #a9b4c0 }
}
"""


class Box(NamedTuple):
    """A box: its corner, its size, its kind and its lines, of which the first is the heading."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    lines: tuple[str, ...]


class Arrow(NamedTuple):
    """A line along points, and whether it is one of training alone."""

    points: tuple[tuple[int, int], ...]
    training: bool = False


BOXES = (
    Box(20, 40, 140, 60, "", ("sample", "image and question")),
    Box(210, 40, 150, 60, "frozen", ("CLIP, frozen", "image and text")),
    Box(410, 40, 150, 60, "", ("keys [K]", "image key, text key")),
    Box(610, 40, 210, 60, "learned", ("router", "scores of the T tasks")),
    Box(610, 150, 210, 60, "", ("rule: k, gate or share", "selection of this sample")),
    Box(210, 150, 350, 60, "learned", ("prompt pool [T, L, D]", "one prompt set per finished stage")),
    Box(210, 270, 350, 60, "frozen", ("multimodal model, frozen", "selected sets stand among its embeddings")),
    Box(610, 270, 210, 60, "answer", ("answer", "routed, or with the task told")),
    Box(20, 380, 220, 60, "learned", ("stage t", "trains one prompt set")),
    Box(290, 380, 220, 60, "learned", ("projection head", "set [L, D] to [L, K]")),
    Box(560, 380, 260, 60, "learned", ("prototype [K]", "what the router keeps of task t")),
)
ARROWS = (
    Arrow(((160, 70), (208, 70))),
    Arrow(((360, 70), (408, 70))),
    Arrow(((560, 70), (608, 70))),
    Arrow(((715, 100), (715, 148))),
    Arrow(((610, 180), (562, 180))),
    Arrow(((385, 210), (385, 268))),
    Arrow(((90, 100), (90, 300), (208, 300))),
    Arrow(((560, 300), (608, 300))),
    Arrow(((190, 380), (190, 190), (208, 190)), training=True),
    Arrow(((240, 410), (288, 410)), training=True),
    Arrow(((510, 410), (558, 410)), training=True),
    Arrow(((820, 410), (840, 410), (840, 70), (822, 70)), training=True),
)


def picture() -> str:
    """The SVG's text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">',
        '<title id="title">A sample\'s keys are routed to prompt sets, which a frozen model answers with</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" style="marker-end: none" d="M0 0L10 5L0 10z"/></marker></defs>',
        '<text class="note" x="20" y="22" style="text-anchor: start">answering: lines; training a stage: dashes; '
        "blue: frozen; orange: learned or fitted per task</text>",
    ]
    for arrow in ARROWS:
        line = "L".join(f"{x} {y}" for x, y in arrow.points)
        kind = ' class="training"' if arrow.training else ""
        parts.append(f'<path{kind} d="M{line}"/>')
    for box in BOXES:
        middle = box.x + box.width // 2
        kind = f' class="{box.kind}"' if box.kind else ""
        parts.append(f'<rect{kind} x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}"/>')
        for number, line in enumerate(box.lines):
            words = "note" if number else "head"
            parts.append(f'<text class="{words}" x="{middle}" y="{box.y + 26 + 20 * number}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
