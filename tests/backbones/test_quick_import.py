"""transformers' model classes without its unused packages, and models that are the same as without such care."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm_weights import load_weights
from pipeline.backbones.meta_weights import PlainMeta
from pipeline.backbones.quick_import import Deferred, deferring
from pipeline.config.models import ModelConfig
from tests.adapters import save_adapter, save_models
from tests.backbones.tiny_families import FAMILIES
from tests.processes import PROJECT

# Seconds to import, by other uses of torch and transformers.
UNUSED = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy", "scipy.optimize")
# Instances in the module's tables are put off too; classes whose module nobody imported have none.
AFTERWARDS = """
from transformers.distributed import sharding_utils, tensor_parallel
assert not isinstance(1, sharding_utils.DTensor)
style = tensor_parallel.ALL_PARALLEL_STYLES["colwise"]
assert style.output_layouts.dim == -1
from torch.distributed.tensor import DTensor, Shard
assert issubclass(DTensor, sharding_utils.DTensor)
class Own(sharding_utils.DTensor): pass
assert issubclass(Own, DTensor) and sharding_utils.Shard(2) == Shard(2)
import torch
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert int(compiled(torch.ones(1))) == 2
"""


def run(program: str, folder: Path) -> str:
    program = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_imports_no_compiler_and_no_distributed_tensors(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_models(tmp_path))
    answer = "from pipeline.adapter import load_adapter; load_adapter('adapter').ask('task aaaaaa asks?')\n"
    shown = f"print(*(name for name in {UNUSED} if name in sys.modules))\n"
    assert run(f"{answer}{shown}{AFTERWARDS}", tmp_path).split() == []


def test_the_names_of_models_are_those_that_a_scan_finds(tmp_path: Path) -> None:
    run(
        "from transformers.utils import import_utils as names\n"
        "from pipeline.backbones.quick_import import _one_scan\n"
        "path = names.__file__.replace('utils/import_utils.py', 'models/__init__.py')\n"
        "found = names.define_import_structure(path)\n"
        "with _one_scan(): known = names.define_import_structure(path)\n"
        "assert known == found and known is not found and len(found) > 5\n",
        tmp_path,
    )


def test_what_is_deferred_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wave: Any = Deferred.of("wave", "Error")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert not isinstance(ValueError(), wave) and "wave" not in sys.modules
    assert isinstance(wave("text"), Exception) and "wave" in sys.modules
    assert isinstance(wave("text"), wave) and not isinstance(ValueError(), wave)


def test_only_modules_of_transformers_get_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    importing = "from scipy.constants import pi"
    with deferring():
        theirs: dict[str, object] = {"__name__": "transformers.loss"}
        exec(importing, theirs)
        assert isinstance(theirs["pi"], Deferred) and "scipy.constants" not in sys.modules
        ours: dict[str, object] = {"__name__": "ours"}
        exec(importing, ours)
    assert round(float(str(ours["pi"])), 2) == 3.14


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_is_bit_for_bit_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    FAMILIES[kind](tmp_path)
    plain, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    found = load_weights(ModelConfig(path=str(tmp_path), dtype="float32"), tmp_path, None, "cpu")
    for kept in ("named_parameters", "named_buffers"):
        expected, got = dict(getattr(plain, kept)()), dict(getattr(found, kept)())
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype and got[name].device == value.device
            assert torch.equal(got[name], value), name


def test_meta_tensors_have_their_shapes_and_others_their_numbers() -> None:
    meta, half = torch.device("meta"), torch.float16
    with PlainMeta():
        for made, shape in (
            (torch.randn(2, 3, device=meta), (2, 3)),
            (torch.arange(0, 10, 2, device=meta), (5,)),
            (1.0 / (10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float, device=meta) / 8)), (4,)),
            (torch.empty_like(torch.empty(3, 1, device=meta)), (3, 1)),
            (torch.nn.Embedding(4, 2, device=meta).weight, (4, 2)),
            (torch.nn.Linear(4, 2, device=meta).weight, (2, 4)),
        ):
            assert made.is_meta and made.shape == shape
        assert torch.zeros_like(torch.empty(2, device=meta), device="cpu", dtype=half).tolist() == [0, 0]
        assert torch.arange(3, device=meta).dtype == torch.int64
        assert torch.arange(3).tolist() == [0, 1, 2] and (torch.arange(3) / 2).tolist() == [0, 0.5, 1]
        filled = torch.nn.Linear(4, 2, device="cpu").weight
        assert not filled.is_meta and filled.abs().sum() > 0
        assert torch.nn.init.normal_(torch.zeros(100)).abs().sum() > 0
