"""What is planned for images of several crops, what `auto` takes into account, and what is said of a GPU too small."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.recipe import Recipe
from pipeline.data.sample import Sample
from pipeline.errors import OutOfMemory
from pipeline.planning.auto import GIB, fit_to_memory
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_files import ModelFiles
from pipeline.planning.model_shape import meta_model
from pipeline.planning.out_of_memory import out_of_memory_advice
from pipeline.planning.plan import Tokens
from pipeline.planning.workload import Workload
from tests.backbones.tiny_families import FAMILIES
from tests.planning.test_sample_lengths import png
from tests.training.worlds import make_recipe

KEY_WIDTH = 12


def activations(recipe: Recipe, tokens: Tokens) -> int:
    return plan_memory(Workload.of(recipe, KEY_WIDTH), 1, meta_model(recipe.model), tokens).bytes_of("activations")


FORMS = [("internvl", (128, 32)), ("llava_next", (64, 64)), ("qwen2_5_vl", (96, 96))]


@pytest.mark.parametrize(("kind", "size"), FORMS)
def test_the_plan_counts_what_the_vision_tower_sees_of_the_largest_image(tmp_path, kind, size):
    recipe = make_recipe(FAMILIES[kind](tmp_path), model__max_length=512)
    samples = [Sample("small", png(16, 16), "what?" * 60, "red"), Sample("large", png(*size), "what?", "red")]
    found = ModelFiles(recipe.model, online=False, cuts=False).tokens(samples)
    alone = ModelFiles(recipe.model, online=False, cuts=False).tokens(samples[:1])
    assert found.text == alone.text  # the longest sample is another one than that of the largest image
    assert (found.crops, found.patches) > (alone.crops, alone.patches) and found.values > alone.values
    assert activations(recipe, found) > activations(recipe, alone)


def test_evaluation_that_does_not_fit_is_told_with_the_field_that_helps(tmp_path, caplog):
    recipe = make_recipe(FAMILIES["llava"](tmp_path), train__deepspeed="auto", evaluate__batch=100000)
    model = meta_model(recipe.model)
    chosen = fit_to_memory(Workload.of(recipe, KEY_WIDTH), 1, model, Tokens(16, 20, 4, "given"), 2 * GIB)
    assert chosen.deepspeed.endswith("zero2.json")
    assert "lower evaluate.batch" in caplog.text


def test_zero3_is_no_advice_for_a_quantised_model() -> None:
    train = make_recipe("none", model__quantization="int8").train
    for quantised in (False, True):
        with pytest.raises(OutOfMemory) as told, out_of_memory_advice(train, quantised):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert ("zero3.json" in str(told.value)) is not quantised


@pytest.mark.parametrize(
    ("work", "section", "fields"),
    [
        ("training", "train", ("train.micro_batch", "train.checkpointing to full", "model.image_tokens")),
        ("evaluation", "evaluate", ("evaluate.batch (now 50)",)),
    ],
)
def test_a_gpu_that_is_too_small_is_told_with_the_fields_that_help(work, section, fields):
    recipe = make_recipe("none")
    with pytest.raises(OutOfMemory) as told, out_of_memory_advice(getattr(recipe, section)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    expected = (f"for {work} (CUDA out of memory)", *fields, "would fail again")
    assert all(field in str(told.value) for field in expected)
