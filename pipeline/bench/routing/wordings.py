"""Questions of the probe: one template for all tasks, in which only the topic differs."""

from __future__ import annotations

import numpy as np

from data_prep.nano.scenes import COLOURS, SHAPES, Scene

# Every task draws from all of them, so what stands around the topic says nothing about the task.
WORDINGS = (
    "what is the {topic} here?",
    "tell me the {topic}.",
    "give the {topic}, please.",
    "which {topic} do you see?",
    "report the {topic} of this one.",
    "note the {topic} down.",
    "state the {topic} in one word.",
    "look for the {topic} and say it.",
)


def question(topic: str, scene: Scene | None, rng: np.random.Generator) -> str:
    """A question about a topic.

    In the topic `{colour}`, `{shape}` and `{thing}` are what is in the scene, or drawn where there is no such thing.
    """
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    if scene is not None and scene.things:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        colour, shape = thing.colour, thing.shape
    wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
    return wording.format(topic=topic.format(colour=colour, shape=shape, thing=f"{colour} {shape}"))
