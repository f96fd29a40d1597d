"""Quantised weights: what they are, that the model is that of the dequantised ones, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.backbones import lmm_weights, quantised
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.quantised import QuantisedLinear, quantise, quantised_bytes
from pipeline.config.models import ModelConfig
from pipeline.errors import MissingExtra, UserError
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.low_rank import LowRank
from pipeline.training.normaliser import Normaliser
from pipeline.training.operations import OperationCount, counting
from tests import tiny
from tests.training.test_low_rank import EVERY, SELECTION, batch_of, modules
from tests.training.worlds import make_module, make_pool

KINDS = ("int8", "nf4")


def layer_of(weight: Tensor, kind: str, bias: Tensor | None = None) -> QuantisedLinear:
    """The layer of a weight [outputs, inputs]."""
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], None if bias is None else bias.dtype, kind)
    values, scales = quantise(weight, kind)
    assert (values.shape, scales.shape) == (layer.weight.shape, layer.scales.shape)
    assert (values.dtype, scales.dtype) == (layer.weight.dtype, layer.scales.dtype)
    layer.weight, layer.scales = nn.Parameter(values, False), nn.Parameter(scales, False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, False)
    return layer


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 128), (3, 5), (33, 20)])
def test_a_value_is_off_by_at_most_half_a_step_of_its_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(*shape).to(dtype)
    found = layer_of(weight, "int8").dequantised(torch.float32)
    steps = weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((found - weight.float()).abs() <= steps / 2 * (1 + 1e-5)).all())
    # nf4's widest gap between two levels is that from -1 to -0.696.
    blocks = layer_of(weight, "nf4")
    off = (blocks.dequantised(torch.float32) - weight.float()).abs().flatten()
    scales = blocks.scales.view(torch.float32).repeat_interleave(quantised.BLOCK)[: off.numel()]
    assert bool((off <= scales * 0.1525).all()) and float(off.mean() / weight.float().abs().mean()) < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros_and_bytes_are_as_planned(kind: str) -> None:
    weight = drawn(6, 128)
    weight[2] = 0.0
    layer = layer_of(weight, kind)
    assert bool((layer.dequantised(torch.float32)[2] == 0).all())
    assert layer.weight.nbytes + layer.scales.nbytes == quantised_bytes(128, 6, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_another_precision_of_the_module_leaves_the_scales_as_they_are(kind: str) -> None:
    layer = layer_of(drawn(6, 128), kind, drawn(6))
    before = layer.dequantised(torch.float32)
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantised(torch.float32), before, atol=0, rtol=0)
    torch.testing.assert_close(layer.dequantised(torch.bfloat16), before.bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_the_backward_pass_and_operations_are_those_of_a_linear_layer(kind: str) -> None:
    layer, inputs, kept = layer_of(drawn(6, 128), kind, drawn(6)), drawn(2, 5, 128).requires_grad_(), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with counting(OperationCount()) as count, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(inputs)
    assert not kept and count.operations == 2 * 2 * 5 * 128 * 6
    expected = linear(inputs, layer.dequantised(torch.float32), layer.bias)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output.square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), inputs)[0])


def test_the_product_that_gpus_get_without_gradients_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = layer_of(drawn(6, 128), "nf4", drawn(6)), drawn(2, 5, 128)
    with torch.no_grad():
        expected = layer(inputs)
        monkeypatch.setattr(quantised, "FUSED", ("cpu",))
        monkeypatch.setattr(QuantisedLinear, "dequantised", None)
        with counting(OperationCount()) as count:
            found = layer(inputs)
        torch.testing.assert_close(layer(inputs[:1, :1]), expected[:1, :1])
    torch.testing.assert_close(found, expected)
    assert count.operations == 2 * 2 * 5 * 128 * 6


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, llava: Path) -> tuple[LMM, LMM]:
    """A quantised model, and the one of its dequantised weights."""
    config = ModelConfig(path=str(llava), max_length=512)
    found, plain = load_lmm(config.model_copy(update={"quantization": request.param})), load_lmm(config)
    for name, layer in plain.linears.items():
        if name == "lm_head":
            assert not isinstance(found.layer(name), QuantisedLinear)
        else:
            mine = found.layer(name)
            assert isinstance(mine, QuantisedLinear) and mine.kind == request.param
            layer.weight.data.copy_(mine.dequantised(torch.float32))
    return found, plain


def step(module: LearnerOnLMM, learner: Learner, bank: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of a step from the same values."""
    generator = torch.Generator().manual_seed(5)
    for value in learner.trainables().values():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    learner.start_stage(bank)
    batch = batch_of(module.lmm, SELECTION)
    loss, _ = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    found = {name: value.grad for name, value in learner.trainables().items() if value.grad is not None}
    assert len(found) == len(learner.trainables())
    return {"loss": loss.detach(), **found}


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert float((found[name] - value).norm() / value.norm()) < 1e-5, name


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_of_low_rank_updates_are_those_of_the_dequantised_model(pair: tuple[LMM, LMM], policy: str) -> None:
    def of(lmm: LMM) -> dict[str, Tensor]:
        learner = Learner({"module": LowRank(lmm, (*EVERY, "lm_head"), 3, 6.0)})
        return step(LearnerOnLMM(lmm, learner, policy), learner, modules(lmm, targets=(*EVERY, "lm_head")))

    require_close(of(pair[0]), of(pair[1]))


@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_gradients_of_prompt_sets_are_those_of_the_dequantised_model(pair: tuple[LMM, LMM], insertion: str) -> None:
    def of(lmm: LMM) -> dict[str, Tensor]:
        module = make_module(lmm, insertion=insertion)
        return step(module, module.learner, make_pool(3).tensors)

    require_close(of(pair[0]), of(pair[1]))


def test_the_decoder_of_every_family_is_quantised_and_nothing_else(checkpoint: Path) -> None:
    lmm = load_lmm(ModelConfig(path=str(checkpoint), max_length=512, quantization="int8"))
    layers = [layer for name, layer in lmm.linears.items() if name != "lm_head"]
    assert layers and all(isinstance(layer, QuantisedLinear) for layer in layers)
    assert {id(one) for one in lmm.modules() if isinstance(one, QuantisedLinear)} == {id(layer) for layer in layers}
    batch = batch_of(lmm)
    with torch.no_grad():
        words = lmm.embed(batch.input_ids, batch.images, batch.has_image)
        places = lmm.image_places(batch.input_ids)
        assert lmm.hidden(words, batch.attention, places, batch.images).isfinite().all()


def test_fingerprints_tell_how_weights_are_quantised(llava: Path) -> None:
    plain, *others = (base_fingerprint(ModelConfig(path=str(llava), quantization=kind)) for kind in ("none", *KINDS))
    assert others == [f"int8:{plain}", f"nf4:{plain}"]
    config = ModelConfig(path=str(llava), quantization="nf4")
    assert [base_fingerprint(config, recorded) for recorded in (plain, *others)] == [f"nf4:{plain}"] * 3


def test_a_missing_or_old_package_is_told_with_what_to_install(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(path=str(llava), quantization="nf4")
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "0.43.1")
        with pytest.raises(UserError, match=r'needs bitsandbytes 0.50 or newer, and 0.43.1 is installed.*>=0.50"`'):
            load_lmm(config)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(
        MissingExtra, match=r'bitsandbytes is not installed; run `pip install "continual-prompts\[quant'
    ):
        load_lmm(config)
    load_lmm(config.model_copy(update={"quantization": "int8"}))  # torch alone does that


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_kernels_is_told(llava: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(quantised, "quantise", fails)
    with pytest.raises(
        UserError, match=rf"quantization {kind} is not possible on cpu \(no kernel image.*another build"
    ):
        load_lmm(ModelConfig(path=str(llava), quantization=kind))


def test_weights_that_are_stored_quantised_are_not_quantised_again(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "stored")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"quantization is int8, and the weights of .* are stored quantised already"):
        load_lmm(ModelConfig(path=str(folder), quantization="int8"))


def test_weights_of_another_shape_are_refused_before_they_are_quantised(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(llava, tmp_path / "other")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(lmm_weights, "_quantization", lambda *_: pytest.fail("it began to load"))
    with pytest.raises(UserError, match="weights of another shape"):
        load_lmm(ModelConfig(path=str(folder), quantization="nf4"))
