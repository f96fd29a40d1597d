"""Schedules: what stands in each block, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.clip.towers import schedule
from pipeline.clip.towers.schedule import Op
from pipeline.errors import UserError

VIT = (12, 12)


def test_mpl_grows_as_the_released_setting_does() -> None:
    # docs/design.md 5.4: prompts per block of ViT-B/16 with n = 1, add 2, remove 1, depth 9.
    vision = schedule.mpl(1, add=2, remove=1, depth=9, blocks=VIT).vision
    assert vision.present == (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9)
    assert [197 + count for count in vision.present] == [198, 199, 200, 201, 202, 203, 204, 205, 206, 206, 206, 206]
    assert vision.carried(1) == 0  # the shallow prompt is the one that leaves
    assert vision.carried(2) == 1


def test_mpl_begins_with_all_slots_where_it_follows_the_figure() -> None:
    vision = schedule.mpl(1, add=2, remove=1, depth=9, blocks=VIT, first="figure").vision
    assert vision.present == (2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10)
    assert vision.carried(1) == 1


def test_mpl_with_one_group_added_and_all_removed_is_maple() -> None:
    assert schedule.mpl(2, add=1, remove=2, depth=9, blocks=VIT) == schedule.maple(2, 9, VIT)
    assert schedule.maple(2, 9, VIT).vision.present == (2,) * 12


def test_mpl_without_removal_grows_at_every_block() -> None:
    assert schedule.mpl(1, add=1, remove=0, depth=4, blocks=(5, 5)).vision.present == (1, 2, 3, 4, 4)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_depth_one_is_a_shallow_prompt(tower: str) -> None:
    deep = getattr(schedule.mpl(2, add=1, remove=2, depth=1, blocks=(3, 3)), tower)
    assert deep.ops == (Op(add=2), Op(), Op())


def test_vpt_replaces_or_carries() -> None:
    assert schedule.vpt(3, 2, (4, 4)).vision.present == (3, 3, 3, 3)
    assert schedule.vpt(3, 2, (4, 4), carry=True).vision.present == (3, 6, 6, 6)
    assert schedule.vpt(3, 2, (4, 4)).text.present == (0, 0, 0, 0)


def test_coop_stands_in_the_text_tower_alone() -> None:
    assert schedule.coop(16, (2, 3)).text.adds == {0: 16}
    assert not schedule.coop(16, (2, 3)).vision.adds


def test_removing_more_than_there_is_names_tower_and_block() -> None:
    # The released code would delete image patches here (docs/design.md 5.6, M2).
    with pytest.raises(UserError, match="Block 1 of the vision tower would remove 2 prompts, but only 1"):
        schedule.mpl(1, add=2, remove=2, depth=9, blocks=VIT)


def test_a_text_tower_that_grows_is_refused() -> None:
    with pytest.raises(UserError, match=r"Block 1 of the text tower.*cannot change between blocks"):
        schedule.schedule([Op(add=2), Op(add=1)], [], (3, 3))


def test_negative_counts_are_refused() -> None:
    with pytest.raises(UserError, match="Block 1 of the vision tower would remove -1"):
        schedule.mpl(1, add=2, remove=-1, depth=2, blocks=VIT)


def test_a_depth_beyond_the_tower_is_refused() -> None:
    with pytest.raises(UserError, match="depth of 13 reaches beyond the text tower, which has 12 blocks"):
        schedule.maple(2, 13, VIT)


def test_an_unknown_first_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"follows 'Figure'; expected one of code, figure. Did you mean 'figure'"):
        schedule.mpl(1, add=2, remove=1, depth=2, blocks=VIT, first="Figure")  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "depth"), [(0, 9), (2, 0)])
def test_no_prompt_and_no_block_are_refused(length: int, depth: int) -> None:
    with pytest.raises(UserError, match="expected 1 or more"):
        schedule.maple(length, depth, VIT)
