"""The wheel: it has every file that is not code, and works far from the repository, with and without extras."""

from __future__ import annotations

import json
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.adapter import load_adapter
from pipeline.errors import EXIT_USER, EXTRAS
from tests import tiny
from tests.adapters import save_adapter, save_models
from tests.packaging.installed import NAME, Environment, build_wheel, install
from tests.processes import PROJECT
from tests.report.test_report import make_run

# Environments that other tools made may lack pip; setuptools comes with torch.
pytestmark = pytest.mark.skipif(find_spec("pip") is None, reason="there is no pip here to build the wheel with")
# One task, so few samples and steps that all of it takes seconds.
FEW = ["data.tasks=[Digits]", "data.tasks.0.limit_train=32", "data.tasks.0.limit_test=8", "train.steps=2"]
SET = [word for override in [*FEW, "train.processes=2"] for word in ("--set", override)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install continual-prompts`."""
    return install(wheel, tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install "continual-prompts[train,track,report,demo]"`."""
    return install(wheel, tmp_path_factory.mktemp("full"), ["train", "track", "report", "demo"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder / "adapter", save_models(folder))


def data_files(folder: Path, inside: str) -> set[str]:
    """The files of a folder that are not code, by the names they have in the wheel."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    left_out = {"__pycache__", "site.env"}
    return {f"{inside}/{path}" for path in found if path.suffix != ".py" and not left_out & set(path.parts)}


def test_the_wheel_has_every_file_that_is_not_code(wheel: Path) -> None:
    wanted = data_files(PROJECT / "pipeline", "pipeline") | data_files(PROJECT / "data_prep", "data_prep")
    wanted |= data_files(PROJECT / "ds_configs", "pipeline/ds_configs") | data_files(
        PROJECT / "slurm", "pipeline/slurm"
    )
    with zipfile.ZipFile(wheel) as file:
        modes = {entry.filename: entry.external_attr >> 16 for entry in file.infolist()}
    assert {"pipeline/py.typed", "data_prep/py.typed", "pipeline/ds_configs/zero3.json"} <= wanted <= set(modes)
    assert not [name for name in modes if not name.startswith(("pipeline/", "data_prep/", NAME.replace("-", "_")))]
    assert all(modes[f"pipeline/slurm/{script}.sh"] & 0o100 for script in ("run_sequence", "prepare_array"))


@pytest.mark.slow
def test_an_adapter_answers_without_what_only_the_extras_have(bare: Environment, adapter: Path) -> None:
    names = [package for packages in EXTRAS.values() for package in packages]
    look = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert bare.run("python", "-c", look).stdout == "[]\n"
    (bare.work / "picture.png").write_bytes(tiny.png((250, 10, 10)))
    asked = ["--image", "picture.png", "--question", "task aaaaaa asks?"]
    done = bare.run("pipeline", "predict", str(adapter), *asked, "--json")
    assert done.returncode == 0, done.stderr
    answer = load_adapter(adapter).ask("task aaaaaa asks?", bare.work / "picture.png")
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["answer"], told["selected"]) == (answer.text, answer.selected)
    assert answer.selected


@pytest.mark.slow
def test_a_verb_names_the_extra_that_it_needs(bare: Environment, adapter: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (bare.work / "photos").mkdir()
    for name, colour in (("a", (250, 10, 10)), ("b", (10, 250, 10))):
        (bare.work / "photos" / f"{name}.png").write_bytes(tiny.png(colour))
    lines = ["image,question,answer", *(f"{'ab'[number % 2]}.png,what {number}?,a" for number in range(20))]
    (bare.work / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    commands = {
        "pipeline check nano": "train",
        "pipeline prepare nano": "train",
        "pipeline run nano": "train",
        "pipeline run base2new_nano": "train",
        f"pipeline report {run}": "report",
        f"pipeline serve {adapter}": "serve",
        "pipeline new-task Shelf --images photos --samples table.csv": "report",
        "python -m data_prep prepare nano": "train",
        "python -m data_prep.nano tasks here": "demo",
        "python -m pipeline.bench data": "train",
        "python -m pipeline.scaling": "train",
    }
    for command, extra in commands.items():
        done = bare.run(*command.split())
        assert done.returncode == EXIT_USER, f"{command}: {done.stdout}{done.stderr}"
        last = done.stderr.strip().splitlines()[-1]
        assert last.endswith(f'is not installed; run `pip install "continual-prompts[{extra}]"`.'), f"{command}: {last}"
    assert {path.name for path in bare.work.iterdir()} <= {"photos", "picture.png", "table.csv"}


@pytest.mark.slow
@pytest.mark.e2e
def test_a_recipe_of_the_wheel_runs_anywhere(full: Environment) -> None:
    def succeeded(*words: str) -> subprocess.CompletedProcess[str]:
        done = full.run("pipeline", *words, timeout=600)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    place = full.run("python", "-c", "import pipeline; print(pipeline.__file__)").stdout.strip()
    assert Path(place).is_relative_to(full.packages)
    succeeded("prepare", "nano", *SET)
    assert json.loads(succeeded("check", "nano", *SET, "--json").stdout.splitlines()[-1])["ok"]
    succeeded("run", "nano", *SET)
    run = full.work / "runs" / "nano-modalprompt-s0"
    assert (run / "report.html").is_file() and (run / "matrix.json").is_file() and (full.work / "mlflow.db").is_file()
    succeeded("export", str(run), "adapter")
    assert "answer: " in succeeded("predict", "adapter", "--question", "which digit is this?").stdout


@pytest.mark.slow
def test_the_scripts_of_the_wheel_submit_from_another_folder(full: Environment) -> None:
    copied = "cp -r \"$(python -c 'import pipeline; print(pipeline.__path__[0])')\"/slurm ."
    subprocess.run(["bash", "-c", copied], cwd=full.work, env={"PATH": f"{full.folder}/bin:/usr/bin:/bin"}, check=True)
    shown = subprocess.run(
        ["slurm/run_sequence.sh", "--chain", "--dry-run", "nano"],
        cwd=full.work,
        env={"PATH": f"{full.folder}/bin:/usr/bin:/bin", "PYTHON": str(full.folder / "bin" / "python")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.count("slurm/run_sequence.sh") == 6  # a job for each task
