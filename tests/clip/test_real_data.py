"""The protocol on real folders: `--data DIR` or TEST_DATA names what holds base2new/ (Caltech101, EasyShapes)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.benchmark import prepare_benchmark
from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.few_shot_batches import FewShotBatches, FewShotImages
from pipeline.clip.learning.protocol import epoch_rates
from pipeline.clip.recipe import ClipRecipe, load_benchmark
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK
from tests.clip import base2new
from tests.processes import program

CHECKPOINT = PROJECT / "data_prep/nano/checkpoints/clip"


@pytest.fixture(scope="module")
def benchmark(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ClipRecipe:
    """The shipped recipe on the real folders, prepared."""
    root, folder = base2new.folder(pytestconfig), tmp_path_factory.mktemp("real")
    places = [f"data.root={root}", f"data.prepared={folder / 'prepared'}", f"run_dir={folder / 'run'}"]
    recipe = load_benchmark("base2new_folders", places)
    prepare_benchmark(recipe, progress=False)
    return recipe


@pytest.mark.parametrize(
    ("name", "base", "new", "test", "steps"), [("caltech101", 50, 50, 999, 1000), ("easy_shapes", 12, 12, 880, 240)]
)
def test_shots_classes_steps_and_rates(
    benchmark: ClipRecipe, name: str, base: int, new: int, test: int, steps: int
) -> None:
    data = PreparedDataset(Path(benchmark.data.prepared) / name)
    assert [len(data.test_images(half).names) for half in ("base", "new")] == [base, new]
    assert len(data.test_images("all").rows) == test
    mpl = next(method for method in benchmark.methods if method.name == "mpl")
    train, pixels = benchmark.train_of(mpl, name), Pixels(CHECKPOINT)
    assert data.train is not None
    for seed in (1, 2, 3):
        shots = data.few_shots(seed, "base")
        assert [shots.labels.count(label) for label in range(base)] == [16] * base
        batches = FewShotBatches(FewShotImages(data.train, shots, pixels, seed, augment=True), train, 4, 1, 0, 1)
        assert batches.steps == steps
    assert epoch_rates(train.lr, train.epochs) == pytest.approx([1e-5, 0.0035, 0.003166, 0.002291, 0.001209], abs=1e-6)


@pytest.mark.slow
def test_the_embedded_model_goes_through_the_protocol(benchmark: ClipRecipe, pytestconfig: pytest.Config) -> None:
    folder = Path(benchmark.run_dir).parent
    quick = ["train.epochs=2", "methods=[zero_shot,mpl]", "seeds=[1]", "train.processes=1", "tracking.enabled=false"]
    places = [f"data.{field}={getattr(benchmark.data, field)}" for field in ("root", "prepared")]
    changes = [part for text in (*quick, *places, f"run_dir={folder / 'run'}") for part in ("--set", text)]
    done = program(folder, "run", "base2new_folders", *changes, "--json")
    assert done.returncode == EXIT_OK, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    lines = {(line["method"], line["dataset"]): line["groups"] for line in result["lines"]}
    assert set(lines) == {(m, d) for m in ("zero_shot", "mpl") for d in ("caltech101", "easy_shapes")}
    majority = 10.6  # percent of EasyShapes' base test images in its largest class
    assert lines["mpl", "easy_shapes"]["base"]["mean"] > 2 * majority
