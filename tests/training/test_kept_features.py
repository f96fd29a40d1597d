"""Vision features that are kept: computed once, the same numbers, and never another model's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.lmm_families import require_kept_features
from pipeline.check.features import check_kept_features
from pipeline.config.models import ModelConfig
from pipeline.config.recipe import Recipe
from pipeline.data.collate import Examples, collate
from pipeline.data.conversation import KEPT
from pipeline.data.kept_features import KeptFeatures, SplitFeatures
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.errors import Interrupted, UserError
from pipeline.files.lock import FileLock
from pipeline.planning.model_files import ModelFiles
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World
from pipeline.sequence.keep_features import keep_features
from pipeline.sequence.run import run_sequence
from pipeline.training.normaliser import Normaliser
from tests.e2e.conftest import recipe_on
from tests.processes import PROJECT, torchrun
from tests.tiny_clip import picture
from tests.training.worlds import make_module, make_pool, make_samples

ALONE = World(0, 1, 0, torch.device("cpu"))
COUNT = 9
SAMPLES = SampleList(  # two pictures are shown by two samples each, two samples have none
    Sample(f"s{n}", None if n in (1, 5) else picture(n % 5, (30, 20)), f"what is {n}?", "red" * (1 + n % 2))
    for n in range(COUNT)
)
PICTURES = len({sample.image for sample in SAMPLES} - {None})


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


@pytest.fixture(autouse=True)
def _few_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pipeline.data.kept_features", "pipeline.sequence.keep_features"):
        monkeypatch.setattr(f"{module}.PICTURES", 3)


def keep(lmm: LMM, folder: Path, count: int = COUNT, model: str = "base") -> KeptFeatures:
    samples: Any = SampleList(SAMPLES)
    samples.folder = folder
    return keep_features(lmm, [(samples, make_samples(1)[1], count)], model, ALONE, Watchdog(ALONE, None))


def towers(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass of the vision tower gets from now on."""
    seen: list[int] = []
    compute = type(lmm.family).image_features

    def counted(self: Any, images: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(images["pixel_values"]))
        return compute(self, images)

    monkeypatch.setattr(type(lmm.family), "image_features", counted)
    return seen


def folder_of(parent: Path) -> Path:
    (found,) = parent.glob("vision-*")
    return found


def test_what_is_kept_is_what_the_tower_gives_rounded_once(lmm: LMM, tmp_path: Path) -> None:
    kept = keep(lmm, tmp_path)
    for index, sample in enumerate(SAMPLES):
        images, features = lmm.conversation.example(sample).images, kept[index]
        if images is None:
            assert features is None
        else:
            # Alone and not in its batch, so sums may be rounded otherwise.
            torch.testing.assert_close(features[None], lmm.tower_features(images).half(), atol=2e-3, rtol=0)  # type: ignore[index]


def test_equal_pictures_are_kept_once(lmm: LMM, tmp_path: Path) -> None:
    keep(lmm, tmp_path)
    files = sorted(folder_of(tmp_path).glob("features-*.safetensors"))
    assert [len(load_file(file)["features"]) for file in files] == [3, PICTURES - 3]
    assert json.loads((folder_of(tmp_path) / "features.json").read_text())["pictures"] == PICTURES


def test_prompts_and_answers_are_the_same_tokens(lmm: LMM, tmp_path: Path) -> None:
    kept = keep(lmm, tmp_path)
    for index, sample in enumerate(SAMPLES):
        computed, read = lmm.conversation.example(sample), lmm.conversation.example(sample, kept[index])
        assert (read.prompt, read.answer, read.picture) == (computed.prompt, computed.answer, computed.picture)


@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_loss_and_gradient_are_those_of_computed_features(lmm: LMM, tmp_path: Path, insertion: str) -> None:
    data = StageData([(SAMPLES, make_samples(COUNT, text_only=(1, 5))[1], None)])
    module = make_module(lmm, 4, insertion)
    torch.nn.init.normal_(module.learner["module"].prompt, std=0.2)
    module.learner.start_stage(make_pool(2).tensors)
    selected = torch.tensor([[n % 2] for n in range(COUNT)])
    found = []
    for kept in (None, keep(lmm, tmp_path)):
        examples = Examples(data, lmm.conversation, "image" if module.in_two_passes else "none", kept=kept)
        batch = collate(examples, range(COUNT), [1.0] * COUNT, selected)
        assert (KEPT in batch.images) is (kept is not None)
        module.zero_grad()
        loss, terms = module(batch, Normaliser(*batch.counts()))
        loss.backward()
        assert module.learner["module"].prompt.grad is not None
        found.append((torch.stack([*terms.values()]), module.learner["module"].prompt.grad.clone()))
    # float16 keeps eleven bits of a feature.
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1][1], found[0][1], atol=2e-3, rtol=0)


def test_a_batch_without_images_runs_on_a_blank(lmm: LMM, tmp_path: Path) -> None:
    data = StageData([(SAMPLES, make_samples(COUNT, text_only=(1, 5))[1], None)])
    examples = Examples(data, lmm.conversation, kept=keep(lmm, tmp_path))
    batch = collate(examples, [1, 5], [1.0] * 2, torch.zeros(COUNT, 0, dtype=torch.long))
    assert not batch.images[KEPT].any()
    assert lmm.embed(batch.input_ids, batch.images, batch.has_image).isfinite().all()


def test_nothing_is_computed_twice(lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = towers(lmm, monkeypatch)
    keep(lmm, tmp_path)
    assert seen == [1, 3, PICTURES - 3, 3]  # a blank for the shape, two files, the first again as a check
    seen.clear()
    keep(lmm, tmp_path)
    assert seen == [1, 3]


def test_an_interrupted_computation_goes_on_with_the_files_that_lack(
    lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(lmm, tmp_path)
    first = folder_of(tmp_path) / "features-000000.safetensors"
    written = first.stat().st_mtime_ns
    (folder_of(tmp_path) / "features-000001.safetensors").unlink()
    seen = towers(lmm, monkeypatch)
    keep(lmm, tmp_path)
    assert seen == [1, PICTURES - 3, 3]
    assert first.stat().st_mtime_ns == written


def test_more_samples_only_add_to_what_is_there(lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(lmm, tmp_path, count=4)
    seen = towers(lmm, monkeypatch)
    kept = keep(lmm, tmp_path)
    assert seen == [1, PICTURES - 3, 3]
    assert kept[COUNT - 1] is not None


@pytest.mark.parametrize("change", ["model", "preprocessing"])
def test_features_of_another_model_or_preprocessing_are_not_used(
    lmm: LMM, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(lmm, tmp_path)
    if change == "preprocessing":
        monkeypatch.setattr(lmm.conversation, "padded", True)
    keep(lmm, tmp_path, model="base" if change == "preprocessing" else "other")
    assert len(list(tmp_path.glob("vision-*"))) == 2


def test_features_that_this_tower_does_not_give_are_refused(lmm: LMM, tmp_path: Path) -> None:
    keep(lmm, tmp_path)
    folder = folder_of(tmp_path)
    identity = json.loads((folder / "features.json").read_text())["identity"]
    split = SplitFeatures(folder, identity)
    split.write(0, load_file(split.file(0))["features"].float() * 1.5)
    with pytest.raises(UserError, match="not those of this model: they differ by up to"):
        keep(lmm, tmp_path)


def test_other_rounding_is_told_and_accepted(lmm: LMM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(lmm, tmp_path)
    folder = folder_of(tmp_path)
    split = SplitFeatures(folder, json.loads((folder / "features.json").read_text())["identity"])
    split.write(0, load_file(split.file(0))["features"].float() * 1.001)
    keep(lmm, tmp_path)
    assert "another machine or by another version" in caplog.text


def test_a_changed_bit_is_told(lmm: LMM, tmp_path: Path) -> None:
    kept = keep(lmm, tmp_path)
    file = folder_of(tmp_path) / "features-000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"was changed since it was written \(its CRC-32\). Remove"):
        [kept[index] for index in range(COUNT)]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features reach 1e\+06, which float16 cannot hold. Set train.vision_features"):
        SplitFeatures(tmp_path, "x").write(0, torch.full((1, 2, 3), 1e6))
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch
from pathlib import Path
from pipeline.data.kept_features import SplitFeatures
split, features = SplitFeatures(Path(sys.argv[1]), "same"), torch.randn(32, 64, 16)
for turn in range(60):
    split.write(turn % 3, features)
    split.read((turn % 3) * 32)
"""


def test_two_processes_that_keep_features_in_one_folder_damage_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors


def test_a_second_job_waits_for_the_first_and_computes_nothing_again(
    lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def other_job_ends(_: object) -> bool:
        tries.append(1)
        if len(tries) == 3:  # the other job has made everything meanwhile
            monkeypatch.setattr(FileLock, "acquire", acquire)
            keep(lmm, tmp_path)
        return len(tries) >= 3

    acquire = FileLock.acquire
    monkeypatch.setattr("pipeline.sequence.keep_features.POLL_S", 0.0)
    monkeypatch.setattr(FileLock, "acquire", other_job_ends)
    written: list[int] = []
    write = SplitFeatures.write

    def counted(split: SplitFeatures, number: int, features: torch.Tensor) -> None:
        written.append(number)
        write(split, number, features)

    monkeypatch.setattr(SplitFeatures, "write", counted)
    keep(lmm, tmp_path)
    assert len(tries) == 3 and len(written) == len(set(written)) > 0


def without_features(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared project in which no features are kept yet."""
    root = shutil.copytree(prepared, tmp_path / "own")
    for kept in root.glob("data/*/train/vision-*"):
        shutil.rmtree(kept)
    return Path(root)


@pytest.mark.e2e
def test_a_run_can_be_stopped_while_features_are_computed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = without_features(prepared, tmp_path)
    write, written = SplitFeatures.write, []

    def told_to_stop(split: SplitFeatures, number: int, features: torch.Tensor) -> None:
        write(split, number, features)
        written.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SplitFeatures, "write", told_to_stop)
    with pytest.raises(Interrupted, match="features"):
        run_sequence(on(root, tmp_path / "runs", train__vision_features="kept"))
    assert written == [0]


def test_a_run_can_be_stopped_while_another_job_computes_features(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = without_features(prepared, tmp_path)
    acquire, tries = FileLock.acquire, list[Path]()

    def held(lock: FileLock) -> bool:
        if "runs" in lock.path.parts or tries:
            return acquire(lock)
        tries.append(lock.path)
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(FileLock, "acquire", held)
    monkeypatch.setattr("pipeline.sequence.keep_features.POLL_S", 0.0)
    with pytest.raises(Interrupted, match="features"):
        run_sequence(on(root, tmp_path / "runs", train__vision_features="kept"))


def test_training_with_kept_features_never_runs_the_tower(
    prepared: Path, lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on(prepared, tmp_path / "first")
    run_sequence(recipe, stages="train")
    seen = towers(lmm, monkeypatch)
    again = on(prepared, tmp_path / "again")
    run_sequence(again, stages="train")
    assert len(seen) == 2 * 2  # of each stage the blank and the check, no step
    assert sets(again, 1).keys() == sets(recipe, 1).keys()
    assert all(torch.equal(value, sets(recipe, 1)[name]) for name, value in sets(again, 1).items())


@pytest.mark.e2e
def test_what_is_held_out_changes_nothing_of_what_is_kept(
    prepared: Path, lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sequence(on(prepared, tmp_path / "all"), stages="train")
    seen = towers(lmm, monkeypatch)
    kept = on(prepared, tmp_path / "kept", data__validation_share=0.34)
    run_sequence(kept, stages="train")
    assert len(seen) == 2 * 2
    computed = on(prepared, tmp_path / "computed", data__validation_share=0.34, train__vision_features="computed")
    run_sequence(computed, stages="train")
    for name, value in sets(computed, 1).items():
        assert torch.allclose(sets(kept, 1)[name], value, atol=1e-3)


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_under_zero3_share_the_work_and_learn_what_one_learns(prepared: Path, tmp_path: Path) -> None:
    runs = []
    for ranks, zero in ((2, 3), (1, 0)):
        recipe = on(prepared, tmp_path / str(ranks), train__deepspeed=f"ds_configs/zero{zero}.json")
        recipe.dump_yaml(tmp_path / f"{ranks}.yaml")
        for split in Path(recipe.data.prepared).glob("*/train/vision-*"):
            for file in split.iterdir():
                file.unlink()
        torchrun(["-m", "pipeline", "train", str(tmp_path / f"{ranks}.yaml")], ranks, 300)
        runs.append(recipe)
    for number in range(2):
        one, two = sets(runs[1], number), sets(runs[0], number)
        assert all((two[name] - value).abs().max() <= 1e-5 for name, value in one.items())


def on(prepared: Path, runs: Path, **changes: Any) -> Recipe:
    return recipe_on(prepared, runs, 2, **{"train__vision_features": "kept", **changes})


def sets(recipe: Recipe, number: int) -> dict[str, torch.Tensor]:
    return load_file(recipe.run_path / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")


def test_a_model_whose_images_differ_in_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.vision_features kept is not possible with a model of type qwen2_5_vl"):
        require_kept_features("qwen2_5_vl")


def test_check_says_what_they_take_and_whether_there_is_room(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on(prepared, tmp_path)
    for split in Path(recipe.data.prepared).glob("*/train/vision-*"):
        shutil.rmtree(split)
    found = check_kept_features(recipe.data, ModelFiles(recipe.model, online=False, cuts=False))
    assert "0.00 MB per image" in found and "for 10 images of the prepared tasks" in found
    monkeypatch.setattr("pipeline.files.atomic.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"make room, set data\.prepared elsewhere"):
        check_kept_features(recipe.data, ModelFiles(recipe.model, online=False, cuts=False))
