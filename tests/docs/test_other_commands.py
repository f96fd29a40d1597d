"""Every other command that the pages show is executed here, small, or stands here with the place where a test runs it
or the reason why none does.

The verbs of `python -m pipeline` are in test_commands.py and test_executed.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from pipeline.bench.__main__ import app as bench
from pipeline.config.paths import PROJECT
from pipeline.planning import scaling
from tests.docs.test_commands import PAGES

PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:python -m (?!pipeline(?: |$))|slurm/\w+\.sh|tests/slurm/cluster\.sh|"
    r"(?:make|sbatch|srun|scancel|squeue|sinfo|tail|export|deepspeed|torchrun|pip|pytest|cp|source|curl|trial=\S*)\b|picture=)"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?! )(.+)$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")

JOB_24H = "--gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/run_sequence.sh"
CLIP = "clip --size nano --classes 4 --images 2 --chunk 2 --batches 1 --rounds 1"
# By what is shown: the same with sizes that take seconds.
BENCHES = {
    "python -m pipeline.bench step --size small": "step --size tiny --rounds 1 --variants after_bos",
    "python -m pipeline.bench switches --size small": "switches --size tiny --samples 2 --rounds 1 --only packing,int8",
    "python -m pipeline.bench tasks --size small": "tasks --size tiny --few 4 --many 8 --samples 1 --rounds 1",
    "python -m pipeline.bench tasks --size small --router random_ridge --key-width 768": (
        "tasks --size tiny --few 4 --many 8 --samples 1 --rounds 1 --router random_ridge --key-width 16"
    ),
    "python -m pipeline.bench loader --samples 1000": "loader --samples 20 --rounds 1",
    "python -m pipeline.bench low-rank --size small": "low-rank --size tiny --many 9 --samples 1 --rounds 1",
    "python -m pipeline.bench routing --tasks 40": "routing --tasks 40 --samples 10 --pictures 200 --routers mean",
    "python -m pipeline.bench keys": "keys --size tiny --samples 4 --batch 2",
    "python -m pipeline.bench clip": CLIP,
    "python -m pipeline.bench startup": "startup --rounds 1",
    "python -m pipeline.bench tracking": "tracking --runs 14 --rounds 1",
    "python -m pipeline.bench clip --size vitb16": CLIP,
}
# The file that runs it, and words of it that do.
ELSEWHERE = {
    "python -m pipeline.bench evaluate RUN": ("tests/docs/test_executed.py", 'bench, ["evaluate", NANO'),
    "python -m pipeline.bench data --records 958000": ("tests/bench/test_data.py", "bench_data(200"),
    "python -m pipeline.bench gpu --out gpu.json": ("tests/bench/test_bench.py", "bench_gpu("),
    "python -m pipeline.bench serve RUN_OR_ADAPTER": ("tests/bench/test_serve.py", '["serve", str(adapter)'),
    "python -m pipeline.bench serve ADAPTER --clients 16 --requests 256": (
        "tests/bench/test_serve.py",
        '"--clients", "4", "--requests"',
    ),
    "python -m pipeline.bench clients RUN_OR_ADAPTER --before ../earlier": (
        "tests/bench/test_serve.py",
        '"clients", str(adapter)',
    ),
    "python -m pipeline.bench serve ADAPTER --clients 8 --requests 300 --engines own,vocabulary,parts --vllm FILE": (
        "tests/vllm/test_bench.py",
        '"--engines", "own,vocabulary,parts"',
    ),
    "picture=$(base64 < scene.png | tr -d '\\n')": (
        "tests/serve/test_openai_client.py",
        'curl.shown("scene.png | tr")',
    ),
    "curl --json @- http://127.0.0.1:8000/v1/chat/completions <<END": (
        "tests/serve/test_openai_client.py",
        'curl.shown("scene.png | tr")',
    ),
    "curl http://127.0.0.1:8000/v1/models": ("tests/serve/test_openai_client.py", 'f"curl {curl.ADDRESS}/v1/models"'),
    "curl --json '{}' http://127.0.0.1:8000/reload": ("tests/vllm/test_end_to_end.py", 'curl.shown("/reload")'),
    "python -m data_prep.nano example .": ("tests/data_prep/test_nano_cli.py", '["example", str('),
    "python -m data_prep.assemble RECIPE": ("tests/data_prep/test_assemble.py", '"--out"'),
    "python -m data_prep.small train PHOTOGRAPHS": ("tests/data_prep/test_small.py", '["train", str(photographs)'),
    "python -m data_prep download coin --tasks ScienceQA,TextVQA,VizWiz --list": (
        "tests/data_prep/test_download.py",
        '["download", "coin", "--tasks", "ScienceQA,TextVQA", "--list"]',
    ),
    "python -m lmms_eval --model continual_prompts --model_args adapter=ADAPTER --tasks TASK --device cpu": (
        "tests/lmms/test_task.py",
        '"-m", "lmms_eval", "--model", "continual_prompts", "--model_args", arguments, "--tasks"',
    ),
    "python -m data_prep download ucit": ("tests/data_prep/test_download.py", '["download", "bench"'),
    "python -m data_prep verify FOLDER": ("tests/docs/test_executed.py", 'data_prep_app, ["verify"'),
    "python -m pipeline.scaling": ("tests/docs/test_other_commands.py", "scaling.main()"),
    "python -m pipeline.recipe_docs": ("tests/docs/test_recipes.py", "page()"),
    "python -m tests.faults": ("tests/faults/test_faults.py", "tests.faults"),
    "cp data/nano-coin/images/shapes/test-00003.png scene.png": ("tests/docs/test_executed.py", "scene"),
    "pip install FOLDER": ("tests/packaging/test_wheel.py", "`pip install continual-prompts`"),
    'pip install "FOLDER[train,track,report]"': ("tests/packaging/test_wheel.py", "train,track,report,demo"),
    "cp -r \"$(python -c 'import pipeline; print(pipeline.__path__[0])')\"/slurm .": (
        "tests/packaging/test_wheel.py",
        "pipeline.__path__[0]",
    ),
    "sbatch slurm/run_sequence.sh": ("tests/slurm/test_script.py", "without_a_recipe_the_embedded_default"),
    f"sbatch --nodes=2 {JOB_24H} RECIPE": (
        "tests/slurm/test_script.py",
        "one_task_per_gpu",
    ),
    f"sbatch --nodes=2 {JOB_24H} RECIPE --set seed=1": (
        "tests/slurm/test_script.py",
        "one_task_per_gpu",
    ),
    "slurm/submit.sh --nodes=1 --gpus-per-node=1 --cpus-per-gpu=8 --time=01:00:00 slurm/run_sequence.sh --prepare "
    "llava15_7b_coin3 --set name=small --set train.steps=20": ("tests/slurm/test_submit.py", '"--prepare"'),
    f"slurm/submit.sh --nodes=2 {JOB_24H} coin_llava15_7b": ("tests/slurm/test_submit.py", "shell.submit(*words"),
    f"slurm/submit.sh --nodes=2 {JOB_24H} RECIPE --set seed=1": ("tests/slurm/test_submit.py", "shell.submit(*words"),
    f"sbatch --nodes=1 {JOB_24H} coin_llava15_7b": (
        "tests/slurm/test_sequence.py",
        "one_node_instead",
    ),
    f"sbatch --nodes=2 {JOB_24H} --train coin_llava15_7b": (
        "tests/slurm/test_sequence.py",
        "--train",
    ),
    "sbatch --nodes=1 --gpus-per-node=8 --cpus-per-gpu=8 --time=12:00:00 slurm/run_sequence.sh --evaluate "
    "runs/coin_llava15_7b-modalprompt-s0": ("tests/slurm/test_sequence.py", "--evaluate"),
    f"sbatch --nodes=2 {JOB_24H} runs/coin_llava15_7b-modalprompt-s0/config.yaml": (
        "tests/slurm/test_script.py",
        "one_task_per_gpu",
    ),
    "sbatch --nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=64 --time=04:00:00 --wrap "
    '"python -m pipeline add runs/coin_llava15_7b-modalprompt-s0 Shelf"': ("tests/docs/test_tutorials.py", "--wrap"),
    "sbatch --nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 --wrap "
    '"python -m pipeline prepare coin_llava15_7b --skip-bad 1000 --gpus 8"': (
        "tests/docs/test_tutorials.py",
        '.removesuffix(" --gpus 8")',
    ),
    "slurm/run_sequence.sh --dry-run coin_llava15_7b": ("tests/slurm/test_script.py", "outside_a_job_dry_run"),
    "slurm/run_sequence.sh --train": ("tests/slurm/test_script.py", "--train"),
    "slurm/run_sequence.sh --dry-run $trial": ("tests/slurm/test_script.py", "outside_a_job_dry_run"),
    "sbatch --nodes=2 slurm/run_sequence.sh --prepare --train $trial": ("tests/slurm/test_script.py", "--prepare"),
    "sbatch --nodes=1 slurm/run_sequence.sh --train $trial": ("tests/slurm/test_sequence.py", "one_node_instead"),
    "sbatch --nodes=2 slurm/run_sequence.sh --evaluate runs/trial": ("tests/slurm/test_sequence.py", "--evaluate"),
    "SBATCH_OPTIONS=--nodes=2 slurm/run_sequence.sh --chain --dry-run $trial": (
        "tests/slurm/test_script.py",
        "--chain",
    ),
    "slurm/prepare_array.sh --tasks 2 $trial": ("tests/slurm/test_sequence.py", "prepare_array"),
    "slurm/prepare_array.sh --tasks 100 RECIPE": ("tests/slurm/test_script.py", "prepare_array"),
    "slurm/compare_array.sh RECIPE --methods A,B --seeds 0,1,2": ("tests/slurm/test_script.py", "shell.compare("),
    "scancel --signal=USR1 1": ("tests/slurm/test_sequence.py", "--signal="),
    "scancel 1": ("tests/slurm/test_sequence.py", "scancel"),
    "tests/slurm/cluster.sh install": ("Makefile", "tests/slurm/cluster.sh install"),
    "tests/slurm/cluster.sh start /tmp/cluster": ("tests/slurm/conftest.py", '[script, "start"'),
    "tests/slurm/cluster.sh stop /tmp/cluster": ("tests/slurm/conftest.py", '[script, "stop"'),
    "export SLURM_CONF=/tmp/cluster/slurm.conf": ("tests/slurm/conftest.py", "SLURM_CONF"),
    "torchrun -m pipeline run ...": ("tests/processes.py", "torch.distributed.run"),
    "deepspeed --module pipeline run ...": ("pipeline/ranks/launch.py", "deepspeed.launcher"),
    "srun python -m pipeline run ...": ("slurm/run_sequence.sh", "srun"),
    "pytest tests/parity/test_clip_prompts.py --fixtures DIR": ("tests/conftest.py", '"--fixtures"'),
    "pytest tests/parity/test_dpl.py --fixtures DIR": ("tests/conftest.py", '"--fixtures"'),
    "pytest tests/clip --data DIR": ("tests/conftest.py", '"--data"'),
}
NOT_EXECUTED = {
    "python -m data_prep download coin": "with --list it is in ELSEWHERE",
    "sbatch --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=16 --time=08:00:00 --wrap "
    '"PIPELINE_API_KEY=KEY python -m pipeline serve runs/coin_llava15_7b-modalprompt-s0 --host 0.0.0.0 --engine vllm '
    '--vllm /shared/.venv-vllm/bin/vllm"': "vLLM with a 7B; tests/vllm starts the same with the embedded model",
    "source .venv/bin/activate": "what `make venv` makes",
    "pip install -e . --no-deps": "asks a package index for what builds it; tests/cli/test_cli.py has the command",
    "pip install lmms-eval==0.7.3": "asks a package index; tests/lmms/environment.sh does",
    "pip install -e .": "asks a package index for what builds it; tests/extending installs the packages without it",
    "pip install --no-deps timm==1.0.31": "asks a package index",
    'pip install "continual-prompts[quantised]"': "asks a package index",
    "scancel --signal=USR1 JOB": "with a number it is in ELSEWHERE",
    "scancel JOB": "with a number it is in ELSEWHERE",
    "sbatch --signal=B:USR1@900 ...": "an option of Slurm",
    "cp slurm/site.env.example slurm/site.env": "a file to be changed by hand",
    "squeue": "only looks",
    "sinfo": "only looks",
    "tail -f sequence-1.out": "only looks",
    'trial="nano --set data.tasks=[Colours,Digits] --set train.steps=20 --set run_dir=runs/trial"': "a variable",
    "python -m data_prep download": "named; with a benchmark it is in ELSEWHERE",
    "python -m pipeline.bench": "named; its verbs are in BENCHES and ELSEWHERE",
}


def shown() -> list[str]:
    """The other commands of all pages, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line for kind, block in BLOCK.findall(text) if not kind for line in block.splitlines()
        ] + INDENTED.findall(text)
        spans = SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        spans = [span for span in spans if " " in span]  # a word alone is a name
        for command in (*lines, *spans):
            if PROGRAM.match(command):
                found[re.split(r"  +#", command)[0].strip()] = None
    return list(found)


SHOWN = shown()


def test_every_other_command_is_executed_or_has_its_place_or_a_reason() -> None:
    assert {command for command in SHOWN if not command.startswith("make ")} == {*BENCHES, *ELSEWHERE, *NOT_EXECUTED}


@pytest.mark.parametrize("target", sorted({command.split()[1] for command in SHOWN if command.startswith("make ")}))
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "-n", target, "VENV=/nowhere"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", [command for command in SHOWN if command.startswith("python -m ")])
def test_the_module_is_there(command: str) -> None:
    module = command.split()[2]
    assert module == "lmms_eval" or find_spec(module) is not None  # which is in an environment of its own


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHES)
def test_the_benchmark_runs(command: str) -> None:
    done = CliRunner().invoke(bench, BENCHES[command].split())
    assert done.exit_code == 0, done.output
    bench_verb, *options = command.removeprefix("python -m pipeline.bench ").split()
    assert all(option in BENCHES[command] for option in (bench_verb, *options[::2]))


def test_the_tables_of_scaling_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main()
    assert capsys.readouterr().out.count("|---|") > 2


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_place_where_a_command_is_run_is_there(command: str) -> None:
    file, words = ELSEWHERE[command]
    assert words in (PROJECT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in SHOWN if "slurm/" in command and ".sh" in command])
def test_a_script_takes_the_options_that_are_shown(command: str) -> None:
    words = shlex.split(command)
    place = max(number for number, word in enumerate(words) if word.endswith(".sh"))  # submit.sh has sbatch's before it
    script = (PROJECT / words[place]).read_text(encoding="utf-8")
    for word in words[place + 1 :]:
        if not word.startswith("--") or word == "--set":
            break
        assert f"{word})" in script or f"{word} " in script, word
