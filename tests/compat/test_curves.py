"""Every method of both halves trains as it did: the loss of every step, and what was learned, of the kept curves.

What changes numbers on purpose says so, and records them anew: `python -m tests.compat.make golden --replace`.
"""

from __future__ import annotations

import pytest

from tests.compat.curves import (
    CLIP,
    CURVES,
    DPL,
    FURTHER,
    LOW_RANK,
    Golden,
    curves_of_benchmark,
    curves_of_dpl,
    curves_of_sequence,
)
from tests.compat.kept import ELSEWHERE, ELSEWHERE_BFLOAT16, ELSEWHERE_LOW_RANK, Tolerance, tolerance

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("working")]


@pytest.mark.parametrize("name", [*CURVES, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_a_sequence_is_learned_as_it_was(name: str) -> None:
    found, golden = curves_of_sequence(name), Golden()
    assert sorted(found) == golden.names(name)
    for stage, curve in found.items():
        golden.compare(stage, curve, tolerance("golden", elsewhere(name)))


def elsewhere(name: str) -> Tolerance:
    """How far the curve may be from the kept one on a machine with other instructions."""
    if name == "bfloat16":
        return ELSEWHERE_BFLOAT16
    return ELSEWHERE_LOW_RANK if name in LOW_RANK else ELSEWHERE


def test_every_method_on_clip_is_learned_as_it_was() -> None:
    found, golden = curves_of_benchmark(), Golden()
    assert sorted(found) == golden.names(CLIP)
    for unit, curve in found.items():
        golden.compare(unit, curve, tolerance("golden"))


def test_dpl_and_its_search_are_learned_as_they_were() -> None:
    found, golden = curves_of_dpl(), Golden()
    assert sorted(found) == golden.names(DPL)
    for unit, curve in found.items():
        golden.compare(unit, curve, tolerance("golden"))
