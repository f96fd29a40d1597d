"""Every method learns on two ranks, under ZeRO-2 and ZeRO-3, what it learns on one; in bf16 it resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import registry
from pipeline.config.method import choice_name, method_options
from pipeline.methods import make_method
from pipeline.ranks.world import init_world
from tests.methods.small import METHODS, PARTS, method_fields
from tests.processes import torchrun
from tests.training.every_method import recipe_of, train

LIMIT_S = 900
ZEROS = (2, 3)
# Parts that no method has as its own are trained by one that takes any.
OTHERS = ("sequential prefix", "sequential deep", "modular after_image")
NAMES = [*METHODS, *OTHERS, *(f"{name} dropout" for name in ("olora", "moelora", "core_moe"))]


@pytest.fixture(scope="module")
def two_ranks(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that train all methods under each ZeRO stage, one after another."""
    folder = tmp_path_factory.mktemp("two_ranks")
    methods = {name: method_fields(name) for name in NAMES}
    job = {"model": str(llava), "out": str(folder), "methods": methods, "zeros": list(ZEROS)}
    (folder / "job.json").write_text(json.dumps(job))
    torchrun(["-m", "tests.training.every_method", str(folder / "job.json")], 2, LIMIT_S)
    return folder


def learned(folder: Path) -> dict[str, Tensor]:
    """What the stages of a folder have left, by stage and name; a core with its bases as one matrix, because rounding
    may turn singular vectors of like strengths."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("stages/*/prompts.safetensors")):
        values = load_file(path)
        cores = [name.removeprefix("core.").removesuffix(".c") for name in values if name.startswith("core.")]
        for name in cores:
            u, v = (values.pop(f"shared.core.{name}.{end}") for end in "uv")
            values[f"core.{name}.c"] = u @ values[f"core.{name}.c"] @ v
        found |= {f"{path.parent.name}: {name}": value for name, value in values.items()}
    return found


def losses_of(folder: Path) -> list[float]:
    """Of all steps of all stages."""
    files = sorted(folder.glob("stages/*/metrics.jsonl"))
    return [json.loads(line)["loss"] for file in files for line in file.read_text().splitlines()]


def test_no_method_and_no_part_is_left_out() -> None:
    assert set(METHODS) == set(registry.names("methods")) - {"zero_shot"}
    assert set(PARTS) == set(registry.names("parts"))
    own = {choice_name(make_method(method_options(method_fields(name))).part or "") for name in NAMES}
    assert own == set(PARTS)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_learn_what_one_learns(llava: Path, two_ranks: Path, tmp_path: Path, name: str) -> None:
    train(recipe_of(llava, method_fields(name), 0), init_world(), tmp_path)
    expected, losses = learned(tmp_path), losses_of(tmp_path)
    assert expected and losses[0] != losses[1]
    for zero in ZEROS:
        folder = two_ranks / f"zero{zero}" / name
        assert losses_of(folder) == pytest.approx(losses, abs=1e-5, rel=1e-5)
        found = learned(folder)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=f"ZeRO-{zero}, {key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bf16_learns_nearly_the_same_and_resumes_bit_for_bit(llava: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(llava, method_fields(name), 0, model__dtype="bfloat16")
    train(recipe_of(llava, method_fields(name), 0), init_world(), tmp_path / "float32")
    train(recipe, init_world(), tmp_path / "whole")
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(tmp_path / "float32"), rel=0.05)
    train(recipe, init_world(), tmp_path / "stopped", stops=True)
    expected, found = learned(tmp_path / "whole"), learned(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.isfinite().all() and torch.equal(found[key], value), key
