"""Any part with the methods that take any: what a stage goes on from, and what is said of earlier tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.methods import Method, make_method
from tests import tiny
from tests.methods.small import PARTS, method_fields
from tests.prompts.stages import trained_by_project


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> LMM:
    folder = tiny.save_llava(tmp_path_factory.mktemp("llava"), tied=True)
    return load_lmm(ModelConfig(path=str(folder)))


def method(name: str, part: str, **options: object) -> Method:
    fields = method_fields(f"{name} {part}")
    chosen = fields["part"] if isinstance(fields["part"], dict) else {"name": fields["part"]}
    return make_method(method_options({**fields, "part": {**chosen, **options}}))


@pytest.mark.parametrize("part", PARTS)
def test_sequential_goes_on_from_the_module_before_and_independent_starts_anew(lmm: LMM, part: str) -> None:
    for name, goes_on in (("sequential", True), ("independent", False)):
        trained = trained_by_project(lmm, method(name, part))
        kept = [key for key in trained.pool.tensors if key in trained.starts[1]]
        assert kept
        for key in kept:
            left, start = trained.pool.tensors[key][0], trained.starts[1][key]
            assert torch.equal(start, left) is goes_on, f"{name}: {key}"
        assert trained.losses[1][0] != trained.losses[1][-1]


@pytest.mark.parametrize("option", [{"insertion": "after_image"}, {"prompt_length": 3}, {"init": "normal"}])
def test_options_of_rows_are_refused_beside_another_part(option: dict[str, Any]) -> None:
    for part in PARTS:
        fields = {**method_fields(f"sequential {part}"), **option}
        if part == "input_rows":
            assert method_options(fields)
            continue
        said = f"{next(iter(option))} are options of the part input_rows, and the part is {part}"
        with pytest.raises(ValidationError, match=said):
            method_options(fields)


def test_what_all_modules_share_and_every_stage_trains_changes_earlier_ones() -> None:
    for part in PARTS:
        told = {name: method(name, part).changes_earlier for name in ("independent", "sequential", "joint")}
        shared = "modules" if part == "dual_prefix" else "nothing"
        assert told == {"independent": shared, "sequential": "modules", "joint": "nothing"}, part
    assert method("independent", "dual_prefix", freeze_g_after_first=True).changes_earlier == "nothing"
    assert method("independent", "dual_prefix", general_layers=[]).changes_earlier == "nothing"
