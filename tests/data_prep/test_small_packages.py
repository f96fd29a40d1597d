"""The recipe `small` with its real packages: skipped where `make small` has not installed them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_prep.assemble.__main__ import app
from data_prep.assemble.recipe import load_assemble_recipe
from data_prep.small.drawings import draw_shapes
from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig

pytestmark = pytest.mark.slow


def installed() -> bool:
    recipe, _ = load_assemble_recipe("small")
    try:
        for part in (recipe.vision, recipe.language):
            name, _, version = str(part.package).partition("==")
            if distribution(name).version != version:
                return False
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not installed(), reason="the packages of the recipe small are not installed; run `make small`")
def test_the_assembled_model_speaks_and_sees(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["small", "--out", str(tmp_path / "small")])
    assert result.exit_code == 0, result.output
    lmm = load_lmm(ModelConfig(path=str(tmp_path / "small")))
    text = lmm.conversation.text("What is the capital of France?", has_image=False)
    ids = torch.tensor([lmm.tokenizer(text)["input_ids"]])
    answer = lmm.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in lmm.tokenizer.decode(answer)
    pixels = lmm.processor.image_processor(
        images=[draw_shapes(np.random.default_rng(seed)).picture for seed in range(2)], return_tensors="pt"
    )["pixel_values"]
    features = lmm.image_features({"pixel_values": pixels})
    assert features.shape == (2 * 49, 576) and features.isfinite().all()
    rows = lmm.model.get_input_embeddings().weight
    assert 0.2 < float(features.norm(dim=-1).mean() / rows.norm(dim=-1).mean()) < 5  # of the size of words
