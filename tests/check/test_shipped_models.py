"""The numbers that ship with the project are those of the models, and `check` plans by them without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline.backbones.lmm import load_processor
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.config.models import ModelConfig
from pipeline.config.yaml_file import recipe_names
from pipeline.data.image_sizes import image_sizes
from pipeline.errors import EXIT_USER, UserError
from pipeline.hub import repository as hub
from pipeline.hub import snapshots
from pipeline.hub.known_models import known_config, known_names, known_processor, known_settings, known_since
from pipeline.planning.model_files import ASSEMBLED, ModelFiles
from tests import tiny
from tests.backbones.real_processors import save_real
from tests.backbones.shrunk_models import as_cached, save_shrunk
from tests.backbones.tiny_families import FAMILIES

SMOL, SMOL_500M = "HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct"
QWEN, LLAVA = "Qwen/Qwen2.5-VL-3B-Instruct", "llava-hf/llava-1.5-7b-hf"
# Parameters of the published weights, an output layer that is tied to the embedding counted once.
PARAMETERS = {
    SMOL: 256_484_928,
    SMOL_500M: 507_482_304,
    QWEN: 3_754_622_976,
    LLAVA: 7_063_427_072,
    "openai/clip-vit-base-patch16": 149_620_737,
    "openai/clip-vit-base-patch32": 151_277_313,
    "openai/clip-vit-large-patch14-336": 427_944_193,
}
SIZES = [(640, 480), (480, 640), (512, 512), (100, 90), (2000, 1500), (1200, 300), (300, 2400)]
OWN = [
    f"{model}_{data}"
    for model in ("smolvlm_256m", "smolvlm_500m", "qwen25vl_3b", "llava15_7b")
    for data in ("own", "coin3")
]


def checked(name: str, *sets: str) -> dict[str, Any]:
    """The object that `check --json` prints for one rank."""
    options = [part for text in sets for part in ("--set", text)]
    done = CliRunner().invoke(app, ["check", name, "--ranks", "1", "--json", *options])
    assert done.exit_code == EXIT_USER and "Traceback" not in done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------- the numbers


def test_every_shipped_model_has_numbers_to_compare_and_says_where_they_are_from() -> None:
    assert set(known_names()) == set(PARAMETERS)
    for name in known_names():
        assert known_since(name) >= "2026-11-29"


@pytest.mark.parametrize("repository", PARAMETERS)
def test_a_shipped_configuration_has_as_many_parameters_as_the_published_weights(repository: str) -> None:
    from transformers import AutoModel, AutoModelForImageTextToText

    config = known_config(repository)
    auto = AutoModel if config.model_type == "clip" else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[repository]


def test_every_model_that_a_shipped_recipe_names_on_the_hub_has_numbers() -> None:
    for name in recipe_names():
        try:
            recipe = load_recipe(name)
        except UserError as error:  # a benchmark of prompt methods on CLIP
            assert "prompt methods on CLIP" in str(error)
            continue
        for path in (recipe.model.path, recipe.keys.path):
            on_hub = hub.is_repository(path) and path not in ASSEMBLED
            assert not on_hub or known_settings(path) is not None, (name, path)


@pytest.mark.parametrize(("repository", "kind"), [(SMOL, "smolvlm"), (QWEN, "qwen2_5_vl"), (LLAVA, "llava")])
@pytest.mark.parametrize("limit", [None, 600])
def test_shipped_settings_make_of_an_image_what_the_processor_makes(
    repository: str, kind: str, limit: int | None, tmp_path: Path
) -> None:
    path = str(save_real(tmp_path / kind, kind))
    sizes = image_sizes(load_processor(ModelConfig(path=path, image_tokens=limit)))
    files = ModelFiles(ModelConfig(path=repository, image_tokens=limit), online=False, cuts=False)
    for size in SIZES:
        shape = files.shipped_shape([size])
        assert shape is not None
        found, expected = (
            (made.tokens, made.runs, made.crops, made.tower_tokens, made.values) for made in (shape, sizes.of(*size))
        )
        assert found == expected, size


def test_a_clip_has_no_processor_of_images_in_text() -> None:
    assert known_processor("openai/clip-vit-base-patch32") is None


# ---------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "name", [OWN[0], OWN[5], *(pytest.param(name, marks=pytest.mark.slow) for name in OWN[1:5] + OWN[6:])]
)
def test_a_recipe_for_a_model_of_the_hub_lacks_only_model_clip_and_data(name: str, empty_machine: Path) -> None:
    found = checked(name)
    path = load_recipe(name).model.path
    assert found["problems"].keys() == {"model", "keys", "data"}, found["problems"]
    (said,) = found["problems"]["model"]
    assert f"run `hf download {path}` where it can be" in said
    assert (
        f"{PARAMETERS[path]:,} parameters" in found["shipped numbers"]
        and "for planning alone" in found["shipped numbers"]
    )
    assert "shipped numbers" not in found["warnings"], found["warnings"]
    assert found["memory"]["ranks"] == 1


def test_the_image_of_the_plan_is_one_of_the_recipes_limit(empty_machine: Path) -> None:
    notes = []
    for limit, tokens in ((64, 64), (320, 320), ("null", 832)):
        found = checked("smolvlm_256m_own", f"model.image_tokens={limit}")
        assert f"takes {tokens} tokens" in found["shipped numbers"]
        notes.append(found["memory"]["parts"]["activations"]["training"])
        assert f"({tokens} per image, the rest assumed)" in found["memory"]["parts"]["activations"]["note"]
    assert notes == sorted(notes) and notes[2] > 4 * notes[0]


def test_what_a_shipped_model_cannot_do_is_said_without_it(empty_machine: Path) -> None:
    small = checked("smolvlm_256m_own", "model.image_tokens=32")
    (said,) = small["problems"]["shipped numbers"]
    assert "an image takes 64 tokens of this model at the least" in said and "memory" not in small["problems"]
    vicuna = checked("qwen25vl_3b_own", "model.template=vicuna_v1")
    assert "Set model.template to auto" in vicuna["problems"]["shipped numbers"][0]
    kept = checked("smolvlm_256m_own", "train.vision_features=kept")
    assert "not possible with a model of type idefics3" in kept["problems"]["vision features"][0]
    tight = checked("smolvlm_256m_own", "model.image_tokens=null", "model.max_length=900")
    assert "takes 832 of the 900 tokens" in tight["warnings"]["shipped numbers"][0]


def test_a_shipped_model_says_whether_sets_may_stand_behind_the_image(empty_machine: Path) -> None:
    found = checked("qwen25vl_3b_own", "method.insertion=after_image")
    assert found["insertion"].startswith("after_image: a qwen2_5_vl computes an image once")
    assert "insertion" not in checked("qwen25vl_3b_own")


def test_a_model_that_needs_one_pass_is_refused_by_check(empty_machine: Path, tmp_path: Path) -> None:
    path = FAMILIES["gemma3"](tmp_path / "gemma")
    for change, named in (
        ("method.insertion=after_image", "method.insertion"),
        ("evaluate.share_images=true", "evaluate"),
    ):
        found = checked("smolvlm_256m_own", f"model.path={path}", "model.image_tokens=null", change)
        (said,) = found["problems"]["insertion"]
        assert said.startswith(named) and "cannot continue from a prefix cache" in said


def test_where_the_cache_has_the_model_its_own_files_are_read(empty_machine: Path, tmp_path: Path) -> None:
    as_cached(empty_machine, SMOL, save_shrunk(tmp_path / "small", SMOL))
    found = checked("smolvlm_256m_own")
    assert found["problems"].keys() == {"keys", "data"}, found["problems"]
    assert "shipped numbers" not in found and found["model"].startswith(f"{SMOL}: idefics3, Idefics3Processor")
    assert found["memory"]["parts"]["weights"]["training"] < 2 << 20


def test_nothing_is_loaded_by_the_shipped_numbers(empty_machine: Path) -> None:
    with pytest.raises(UserError, match=f"hf download {SMOL}"):
        load_processor(ModelConfig(path=SMOL))
    with pytest.raises(UserError, match=f"hf download {SMOL}"):
        snapshots.checkpoint(snapshots.Source(SMOL))


def test_an_unknown_model_is_not_planned(empty_machine: Path) -> None:
    found = checked("smolvlm_256m_own", "model.path=owner/unknown")
    assert "shipped numbers" not in found and "hf download owner/unknown" in found["problems"]["model"][0]
    assert "memory" not in found["problems"] and found["memory"].startswith("not planned: the configuration of")


def test_a_local_folder_is_never_taken_for_a_shipped_model(empty_machine: Path, tmp_path: Path) -> None:
    tiny.save_llava(tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    found = checked("llava15_7b_own", "model.image_padding=none")
    assert "shipped numbers" not in found and found["memory"]["parts"]["weights"]["training"] < 2 << 20
