"""Loss curves as they were: whoever changes a number of the training sees it here, and says so in the change.

To record them anew: run this file with `-s` and copy what it prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ranks.world import init_world
from pipeline.sequence.engine import lmm_engine
from tests.training.worlds import KEY_WIDTH, make_pool, make_recipe, make_samples, train_once

RELATIVE = 1e-4  # other processors and versions of torch add in another order
STEPS = 8
LOSSES = {
    "after_bos": [8.213176, 7.682321, 7.610631, 7.377445, 7.455852, 7.176493, 6.948856, 6.902077],
    "after_image": [8.157371, 7.49239, 7.484603, 7.19822, 7.346802, 7.16069, 6.755171, 7.016789],
}


@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_the_loss_of_every_step_is_the_recorded_one(llava: Path, tmp_path: Path, insertion: str) -> None:
    recipe = make_recipe(
        llava, train__deepspeed="ds_configs/zero0.json", train__steps=STEPS, method__insertion=insertion
    )
    world = init_world()
    engine = lmm_engine(recipe, world, KEY_WIDTH)
    samples = make_samples(12, text_only=(3,))
    history, _ = train_once(engine, recipe, world, tmp_path, make_pool(3), samples)
    found = [progress.loss for progress in history]
    print(f'    "{insertion}": {[round(loss, 6) for loss in found]},')
    assert found == pytest.approx(LOSSES[insertion], rel=RELATIVE)
