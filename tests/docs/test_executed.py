"""The commands and Python that the documentation shows are executed, in the order of a first visit, on small tasks.

What the words in capitals stand for is said here; so is why a command is not executed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.__main__ import app as data_prep_app
from data_prep.nano.example import write_example
from pipeline.bench.__main__ import app as bench
from pipeline.cli.commands import app
from pipeline.config import yaml_file as recipe_file
from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT
from tests.docs.test_commands import PAGES, TUTORIALS, commands
from tests.serve.conftest import address_of, start

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

VISITED = [page for page in PAGES if page not in TUTORIALS]
SHOWN = {command for page in VISITED for command in commands(page)}
SMALL_TASKS = [
    {"name": name, "metric": "exact", "limit_train": 32, "limit_test": 6} for name in ("Colours", "Charts", "Boxes")
]
SMALL_TRAINING = {"steps": 2, "processes": 1, "deepspeed": "ds_configs/zero0.json"}
NANO = "runs/nano-modalprompt-s0"
STANDS_FOR = {
    "RECIPE": "nano_paper",
    "RUN": NANO,
    "RUN/config.yaml": f"{NANO}/config.yaml",
    "ADAPTER": "adapter",
    "NEW": "new-adapter",
    "TASK": "Shelf",
}
# Of this process's environment; a user's next command has them not.
LEFT_BY_A_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HUB_MODEL = "a model from the Hub; see tests/e2e/test_hub_id.py and tests/check/test_shipped_models.py"
CLIP_BENCHMARK = "ViT-B/16 and data sets of gigabytes"
LABELLED_BY_HAND = "waits for a person, as which tests/browser/test_own_images.py and tests/clip/test_person.py act"
MANY_NANO = "minutes; tests/prompts/test_resembling_tasks.py tells its tasks apart"
NOT_EXECUTED = {
    "serve runs/nano-modalprompt-s0 --engine vllm --checkpoint checkpoint": "needs vLLM; see "
    "tests/serve/front/test_process.py, and tests/vllm for the real one",
    "serve runs/nano-modalprompt-s0 --engine vllm --sets parts --checkpoint parts": "needs vLLM; see "
    "tests/serve/front/test_parts.py, and tests/vllm for the real one",
    "serve RUN --engine vllm --sets lora --checkpoint loras": "needs vLLM; see "
    "tests/serve/front/test_loras.py, and tests/vllm for the real one",
    "export RUN loras --as lora": "a run with low-rank updates; see tests/serve/front/test_loras.py",
    "export RECIPE parts --as parts": "tests/e2e/test_vllm_engine.py exports the recipe that its engine serves",
    "run base2new_nano": "minutes; tests/clip/test_recipe.py runs the recipe's parts",
    "check base2new_vitb16": CLIP_BENCHMARK,
    "prepare base2new_vitb16 --set data.datasets=[dtd,eurosat]": CLIP_BENCHMARK,
    "run base2new_vitb16 --set data.datasets=[dtd,eurosat] --set methods=[maple,mpl]": CLIP_BENCHMARK,
    "report runs/base2new_vitb16": CLIP_BENCHMARK,
    "run label_folder --label --set data.root=PHOTOS": LABELLED_BY_HAND,
    "run label_folder --set data.root=PHOTOS": LABELLED_BY_HAND,
    "label runs/label_folder": LABELLED_BY_HAND,
    "predict runs/label_folder --image photo.jpg": LABELLED_BY_HAND,
    "compare nano --methods modalprompt,task_lora --seeds 0,1,2": "minutes; see tests/e2e/test_compare.py",
    (
        "compare nano --methods modalprompt,modular,task_lora,lora,olora,hide,disco,core_moe,ewc,zero_shot "
        "--seeds 0,1,2 --jobs 2 --set train.processes=1 --set train.budget=19200 "
        "--set 'comparison.targets=[q_proj,v_proj]'"
    ): "hours; see tests/e2e/test_compare.py",
    "run coin_llava15_7b --set keys.text_feature=pooled": "a model of 7 billion parameters",
    "check coin_llava15_7b --gpu-memory 12": "a model that is not here, but for its memory plan; see "
    "tests/check/test_check_device.py",
    "run many_nano --set method.router=prototype --set method.gate=0.1 --set method.share=null": MANY_NANO,
    "run many_nano --set method.router=random_ridge --set method.gate=null --set method.share=0.5": MANY_NANO,
    "check mine.yaml": "tests/docs/test_reference_pages.py reads the recipe; its model is one from the Hub",
    "check smolvlm_256m_own": HUB_MODEL,
    "run smolvlm_256m_own": HUB_MODEL,
    "add runs/smolvlm_256m_own-modalprompt-s0 Shelf": HUB_MODEL,
    "add RUN TASK --again --set train.lr_prompt=3e-3": "tests/e2e/test_again.py trains it and undoes it",
    "add RUN TASK --again": "it brings back what `undo` took; see tests/e2e/test_again.py",
    "undo RUN --dry-run": "tests/sequence/test_taken_back.py",
    "undo RUN": "other commands need the task; see tests/e2e/test_again.py",
    "run real6_nano --set data.root=FOLDER": "six public data sets",
    "run real6_nano_task_lora --set data.root=FOLDER": "six public data sets",
    "run real6_small --set data.root=FOLDER": "six public data sets, and the model of `make small`",
    "run real6_small_task_lora --set data.root=FOLDER": "six public data sets, and the model of `make small`",
    "run real6_small --set data.root=FOLDER --set method.answer_head=none --set data.tasks=[{name: Shapes, metric: "
    "exact_ci, limit_test: 250}, {name: Classify, metric: exact_ci, limit_test: 250}, {name: Signs, metric: exact_ci, "
    "limit_test: 250}] --set train.processes=1": "six public data sets, and the model of `make small`",
    "run real6_nano --set data.root=FOLDER --set method.name=sequential": "six public data sets",
    "run real6_nano --set data.root=FOLDER --set method.name=independent": "six public data sets",
}
PYTHON_NOT_EXECUTED = {
    "clip_prompts.md": "a checkpoint from the hub and a batch of pictures",
    "extending.md": "tests/extending runs its packages and the tests that it shows",
}
# What commands of this beginning speak of and nothing shown makes: the command that does, and what is there then.
MADE_BEFORE = [
    ("add", "run nano", NANO),  # as `make demo` does
    ("report", "run nano_paper", "runs/nano_paper-modalprompt-s0"),
    ("merge", "prune adapter Colours Charts Shelf --into another-adapter", "another-adapter"),
]
# What has to be there before others; the rest follows in the order of the pages.
FIRST = [
    "prepare nano",
    "check nano",
    "run nano --set seed=1",
    "new-task",
    "add",
    "export",
    "prune adapter",
    "merge smaller",
]


def executed() -> list[str]:
    """The commands that are executed, in order; verbs that are only named are left out."""
    shown = list(dict.fromkeys(command for page in VISITED for command in commands(page)))
    shown = [command for command in shown if " " in command.strip() or command == "ls"]
    return sorted((c for c in shown if c not in NOT_EXECUTED), key=_place)


def _place(command: str) -> int:
    words = " ".join(command.split())
    return next((number for number, start in enumerate(FIRST) if f"{words} ".startswith(f"{start} ")), len(FIRST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a user's pictures and table, in which the shipped recipes are small."""
    folder, recipes = tmp_path_factory.mktemp("tour"), tmp_path_factory.mktemp("recipes")
    write_example(folder, 12, seed=0)  # as the tutorial's first command
    for name in ("nano", "nano_paper", "real6_nano"):
        fields = {"extends": str(recipe_file.RECIPES / f"{name}.yaml"), "name": name, "train": SMALL_TRAINING}
        if name != "real6_nano":
            fields["data"] = {"tasks": SMALL_TASKS}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_file, "RECIPES", recipes)
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[int, str]]:
    """Exit code and output of every command that is executed."""
    found: dict[str, tuple[int, str]] = {}
    for command in executed():
        for start_of, made, missing in MADE_BEFORE:
            if command.startswith(start_of) and not (folder / missing).exists():
                CliRunner().invoke(app, shlex.split(made))  # should it fail, so does the command
        if "scene.png" in command and not (folder / "scene.png").exists():
            _copy_as_the_readme_says()
        if command.startswith(("serve", "ui ")):
            found[command] = _served(command)
            continue
        arguments = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
        asked = "how large is the group here?\n/quit\n" if command.startswith("chat") else None
        with pytest.MonkeyPatch.context() as patch:
            for name in LEFT_BY_A_RUN:
                patch.delenv(name, raising=False)
            done = CliRunner().invoke(app, arguments, input=asked)
        found[command] = done.exit_code, done.output
    return found


def _copy_as_the_readme_says() -> None:
    (line,) = re.findall(r"^cp (\S+) (scene\.png)", (PROJECT / "README.md").read_text("utf-8"), re.MULTILINE)
    shutil.copy(*line)


def _served(command: str) -> tuple[int, str]:
    """Start the service as shown but at a free port, and end it when it listens."""
    words = shlex.split(command)
    process = start(Path(words[1]), *words[2:], "--port", "0", verb=words[0])
    try:
        address = address_of(process)
    finally:
        process.terminate()
        code = process.wait(60)
    return code, address


def test_every_command_is_executed_or_has_a_reason() -> None:
    named = {command for command in SHOWN if " " not in command.strip() and command != "ls"}
    assert {*executed(), *NOT_EXECUTED, *named} == set(SHOWN)


@pytest.mark.parametrize("command", executed())
def test_the_command_does_what_it_says(outcomes: dict[str, tuple[int, str]], command: str) -> None:
    code, output = outcomes[command]
    assert code == 0, output


def test_the_benchmark_of_evaluation_takes_a_finished_run(outcomes: dict[str, tuple[int, str]]) -> None:
    assert outcomes  # the run is there
    done = CliRunner().invoke(bench, ["evaluate", NANO, "--limit", "2"])
    assert done.exit_code == 0, done.output


def test_prepared_data_is_verified(outcomes: dict[str, tuple[int, str]]) -> None:
    assert outcomes  # the data is there
    done = CliRunner().invoke(data_prep_app, ["verify", load_recipe("nano").data.prepared])
    assert done.exit_code == 0 and "Colours/test: whole" in done.output, done.output


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{number}", block)
        for page in VISITED
        if page.name not in PYTHON_NOT_EXECUTED
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL), start=1)
    ]


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in python_blocks()])
def test_the_python_runs(outcomes: dict[str, tuple[int, str]], block: str) -> None:
    """In a process of its own, as it is for a reader: MLflow's global state would reach the tests after this one."""
    assert outcomes  # what they speak of is there
    if "openai" in block:
        pytest.importorskip("openai")
        process = start(Path(NANO), "--port", "0")
        try:
            _run_python(block.replace("http://127.0.0.1:8000", address_of(process)))
        finally:
            process.terminate()
            process.wait(60)
    else:
        prelude = "from pipeline.adapter.load import load_adapter\nadapter = load_adapter('adapter')\n"
        _run_python(block if "load_adapter(" in block else prelude + block)


def _run_python(block: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_BY_A_RUN}
    done = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if "print(" in block:
        assert done.stdout.strip()
