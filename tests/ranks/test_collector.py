"""The garbage collector while modules are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.ranks.collector import collector_paused, importing


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def generation_of(wanted: object) -> int | None:
    return next((n for n in range(3) if any(found is wanted for found in gc.get_objects(generation=n))), None)


def test_objects_of_an_import_are_old_and_those_of_loading_are_young() -> None:
    gc.enable()
    with importing():
        assert not gc.isenabled()
        with collector_paused():
            imported: list[Any] = [[]]
        assert not gc.isenabled(), "the inner block leaves the outer one's setting"
    with collector_paused():
        loaded: list[Any] = [[]]
        assert generation_of(loaded) == 0
    assert gc.isenabled() and generation_of(imported) == 2
    imported.append(imported)
    gc.collect()
    assert generation_of(imported) == 2, "it is not frozen"


def test_what_the_program_froze_stays_frozen() -> None:
    kept: list[Any] = [[]]
    gc.freeze()
    with importing():
        pass
    # Frozen objects are in no generation; their number may fall, because some are freed by their last reference.
    assert gc.get_freeze_count() > 0 and generation_of(kept) is None


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
