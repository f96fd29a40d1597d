"""Every architecture under ZeRO-3 on two ranks, one of which may see an image where the other has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_worlds import flat, launch

ZERO3 = {"train__deepspeed": "ds_configs/zero3.json"}


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_train_like_one(checkpoint: Path, tmp_path: Path) -> None:
    one = launch(tmp_path / "one", checkpoint, 1, {"whole": {"train__deepspeed": "ds_configs/zero0.json"}})
    two = launch(tmp_path / "two", checkpoint, 2, {"whole": ZERO3, "cut": {**ZERO3, "train__micro_batch": 1}})
    for name, result in two.items():
        for kind in ("losses", "prompt"):
            found, wanted = flat(result["first"][kind]), flat(one["whole"]["first"][kind])
            assert found == pytest.approx(wanted, abs=1e-4), f"{name}: {kind}"
