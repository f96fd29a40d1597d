"""Every method of both halves trains as it did: the loss of every step, and what was learned, of the kept curves.

What changes numbers on purpose says so, and records them anew: `python -m tests.compat.make golden --replace`.
"""

from __future__ import annotations

import pytest

from tests.compat.curves import CLIP, CURVES, FURTHER, Golden, curves_of_benchmark, curves_of_sequence
from tests.compat.kept import tolerance

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("working")]


@pytest.mark.parametrize("name", [*CURVES, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_a_sequence_is_learned_as_it_was(name: str) -> None:
    found, golden = curves_of_sequence(name), Golden()
    assert sorted(found) == golden.names(name)
    for stage, curve in found.items():
        golden.compare(stage, curve, tolerance("golden", bfloat16=name == "bfloat16"))


def test_every_method_on_clip_is_learned_as_it_was() -> None:
    found, golden = curves_of_benchmark(), Golden()
    assert sorted(found) == golden.names(CLIP)
    for unit, curve in found.items():
        golden.compare(unit, curve, tolerance("golden"))
