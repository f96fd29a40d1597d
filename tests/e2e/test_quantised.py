"""A run on quantised weights: trained, resumed, evaluated, exported and asked; and that it stays with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.adapter.meta import META
from pipeline.adapter.predict import predict
from pipeline.backbones.lmm import LMM
from pipeline.backbones.quantised import QuantisedLinear
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, UserError
from pipeline.prompts.model import LearnerOnLMM
from pipeline.sequence.run import run_sequence
from pipeline.sequence.stage import StageTrainer, TrainedStage
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_task_lora import METHOD, learned
from tests.stopping import signal_in_forward

ZERO2 = "ds_configs/zero2.json"
LORA = {
    "tasks": 2,
    "method": METHOD,
    "model__quantization": "nf4",
    "model__dtype": "bfloat16",
    "train__deepspeed": ZERO2,
}
SETS = {"tasks": 1, "model__quantization": "int8", "evaluate__told": "never"}


@pytest.mark.parametrize("changes", [LORA, SETS], ids=["low rank on nf4", "sets on int8"])
def test_a_run_goes_on_bit_for_bit_changes_no_weight_and_is_answered_with_alike(
    make: MakeRecipe, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = StageTrainer.train

    def watched(self: StageTrainer, *given: Any) -> TrainedStage:
        lmm: LMM = self.engine().module.lmm
        assert any(isinstance(layer, QuantisedLinear) for layer in lmm.linears.values())
        before = {name: value.clone() for name, value in lmm.state_dict().items()}
        trained = train(self, *given)
        assert all(torch.equal(value, before[name]) for name, value in lmm.state_dict().items())
        return trained

    def recipe(name: str, **more: Any) -> Recipe:
        return make(**{"run_dir": str(tmp_path / name), "evaluate__zero_shot": False, **changes, **more})

    monkeypatch.setattr(StageTrainer, "train", watched)
    whole, stopped = recipe("whole"), recipe("stopped", train__save_steps=1)
    result = run_sequence(whole)
    with signal_in_forward(LearnerOnLMM, 2 * changes["tasks"] - 1), pytest.raises(Interrupted, match="step 1 of 2"):
        run_sequence(stopped, stages="train")
    run_sequence(stopped, stages="train")
    for number in range(changes["tasks"]):
        again = learned(stopped, number)
        assert all(torch.equal(again[name], value) for name, value in learned(whole, number).items())
    meta = json.loads((whole.run_path / "stages" / "01-T0" / "meta.json").read_text())
    assert meta["base_model"].startswith(f"{whole.model.quantization}:tensors-1:")
    assert len(result["accuracy"]) == changes["tasks"]

    export(whole.run_path, tmp_path / "adapter")
    answerer = Answerer(source_of(tmp_path / "adapter"))
    assert any(isinstance(layer, QuantisedLinear) for layer in answerer.lmm.linears.values())
    asked = [Question(f"task {number} asks?", None) for number in range(2)]
    expected = [answer.text for answer in answerer.answer(asked)]
    assert [answer.text for answer in Answerer(source_of(whole.run_path)).answer(asked)] == expected
    assert predict(tmp_path / "adapter", None, asked[0].text)["answer"] == expected[0]

    # The same folder for other weights: the recipe, and stages and adapter whatever a recipe says.
    other = whole.model_copy(update={"model": whole.model.model_copy(update={"quantization": "none"})})
    with pytest.raises(UserError, match=rf"belongs to another recipe \(model.quantization: {meta['base_model'][:3]}"):
        run_sequence(other)
    other.dump_yaml(whole.run_path / "config.yaml")
    with pytest.raises(UserError, match=rf"another base model \({meta['base_model'][:20]}.*, now tensors-1:"):
        run_sequence(other)
    content = json.loads((tmp_path / "adapter" / META).read_text())
    content["model"]["quantization"] = "none"
    (tmp_path / "adapter" / META).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"another base model \(fingerprint {meta['base_model'][:20]}"):
        source_of(tmp_path / "adapter")


def test_zero3_is_refused_before_anything_is_loaded_and_auto_is_zero2(make: MakeRecipe) -> None:
    assert make(model__quantization="nf4", train__deepspeed="auto").train.deepspeed == ZERO2
    assert make(train__deepspeed="auto").train.deepspeed == "auto"
    recipe = make(model__quantization="nf4", train__deepspeed="ds_configs/zero3.json")
    with pytest.raises(UserError, match=r"nf4 is not possible under ZeRO-3 .*set train.deepspeed to ds_configs/zero2"):
        run_sequence(recipe)


def test_kept_vision_features_are_those_of_the_unquantised_model(make: MakeRecipe, prepared: Path) -> None:
    def folders() -> list[Path]:
        return sorted((prepared / "data" / "T0" / "train").glob("vision-*"))

    plain = {"tasks": 1, "train__vision_features": "kept", "train__steps": 1, "evaluate__zero_shot": False}
    run_sequence(make(**plain, seed=5), stages="train")
    before = folders()
    run_sequence(make(**plain, seed=6, model__quantization="int8"), stages="train")
    assert folders() == before and before
