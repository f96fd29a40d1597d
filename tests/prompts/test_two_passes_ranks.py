"""Sets behind the image on two ranks: both passes run inside the engine, whatever DeepSpeed does with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.training.test_worlds import flat, launch


@pytest.mark.gloo
@pytest.mark.slow
def test_two_passes_on_two_ranks_train_like_on_one(tmp_path: Path) -> None:
    model = tiny.save_llava(tmp_path / "llava", tied=True)
    behind = {"method__insertion": "after_image"}
    stages: dict[str, dict[str, Any]] = {
        name: {**behind, "train__deepspeed": f"ds_configs/{name}.json"} for name in ("zero0", "zero2", "zero3")
    }
    cut = {"zero3, cut": {**stages["zero3"], "train__micro_batch": 1}}  # one rank has a question without an image
    one = launch(tmp_path / "one", model, 1, {"zero0": stages["zero0"], "after_bos": {}})
    two = launch(tmp_path / "two", model, 2, {"zero2": stages["zero2"], "zero3": stages["zero3"], **cut})
    expected = one["zero0"]["first"]
    for name, result in two.items():
        for kind in ("losses", "prompt"):
            found, wanted = flat(result["first"][kind]), flat(expected[kind])
            assert found == pytest.approx(wanted, abs=1e-5 if kind == "losses" else 1e-4), f"{name}: {kind}"
    assert expected["losses"] != one["after_bos"]["first"]["losses"]
