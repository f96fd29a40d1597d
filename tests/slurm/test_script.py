"""What slurm/run_sequence.sh asks of Slurm, and what it makes of the answers, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import PROJECT

SCRIPTS = PROJECT / "slurm"
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_GPUS_ON_NODE": "4",
}
STAND_INS = {
    "scontrol": """
case "$*" in
    "show hostnames "*) printf 'localhost\\nother\\n' ;;
    "show job "*)
        [ "$(grep -c "^scontrol show job" "$CALLS")" -gt "${BUSY:-0}" ] || exit 1
        echo "JobId=41 JobState=${JOB_STATE:-RUNNING} Reason=None Requeue=${REQUEUE:-1} Restarts=0"
        ;;
    "requeue "*) [ -z "${NO_REQUEUE:-}" ] && [ "$(grep -c "^scontrol requeue" "$CALLS")" -gt "${BUSY:-0}" ] ;;
esac""",
    "srun": 'eval "${SRUN:-exit 0}"',
    "sbatch": 'number=$(cat "$CALLS/../count" 2>/dev/null || echo 100); echo $((number + 1)) | tee "$CALLS/../count"',
    "apptainer": "exit 0",
    "python-stand-in": 'eval "${RUN:-exit 0}"',
}


class Shell:
    """Calls the script with stand-ins that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.calls_file = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, body in STAND_INS.items():
            path = self.bin / name
            path.write_text(
                f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}\n'.replace("$CALLS/..", str(folder))
            )
            path.chmod(0o755)
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {
            **outside,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PYTHON": "python-stand-in",
            "RETRY_S": "0",
        }
        self.environment.pop("SITE_ENV", None)

    def start(self, *arguments: str, script: str = "run_sequence.sh", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(SCRIPTS / script), *arguments],
            cwd=PROJECT,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(
        self, *arguments: str, script: str = "run_sequence.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, script=script, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def job(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script as Slurm would on the first node of a job."""
        return self(*arguments, **{**JOB, "SLURM_SUBMIT_DIR": str(PROJECT), **environment})

    def prepare(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script that prepares data."""
        return self(*arguments, script="prepare_array.sh", **environment)

    def compare(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script that compares methods."""
        return self(*arguments, script="compare_array.sh", **environment)

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script that checks and submits."""
        return self(*arguments, script="submit.sh", **environment)

    def wait_for(self, word: str, process: subprocess.Popen[str]) -> None:
        """Wait until a stand-in has noted that it is so far."""
        while word not in (self.calls_file.read_text("utf-8") if self.calls_file.exists() else ""):
            assert process.poll() is None
            time.sleep(0.02)

    def calls(self, program: str) -> list[str]:
        """The arguments of every call of a program so far."""
        text = self.calls_file.read_text("utf-8") if self.calls_file.exists() else ""
        return [line.removeprefix(f"{program} ") for line in text.splitlines() if line.startswith(f"{program} ")]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_job_starts_one_task_per_gpu_and_ends_all_when_one_fails(shell: Shell) -> None:
    assert shell.job("nano", "--set", "seed=3").returncode == 0
    (call,) = shell.calls("srun")
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4"} <= set(call.split())
    assert {"--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--distribution=block"} <= set(call.split())
    assert call.endswith("python-stand-in -m pipeline run nano --set seed=3")


def test_tasks_per_node_that_were_asked_for_go_before_the_number_of_gpus(shell: Shell) -> None:
    shell.job("nano", SLURM_NTASKS_PER_NODE="2")
    assert "--ntasks=4" in shell.calls("srun")[0]


def test_more_tasks_than_processors_is_an_error_that_names_the_option(shell: Shell) -> None:
    done = shell.job("nano", SLURM_CPUS_ON_NODE="1")
    assert (done.returncode, shell.calls("srun")) == (2, [])
    assert "1 CPUs per node for 4 tasks; submit it with --cpus-per-gpu" in done.stderr


def test_the_tasks_learn_where_rank_0_is_and_every_start_uses_another_port(shell: Shell) -> None:
    show = 'echo "$MASTER_ADDR $MASTER_PORT $LOCAL_WORLD_SIZE" >&2'
    starts = [shell.job("nano", SRUN=show, SLURM_RESTART_COUNT=count).stderr.split() for count in ("0", "1")]
    assert starts == [["localhost", "10656", "4"], ["localhost", "10657", "4"]]


def test_prepare_is_a_step_of_one_task_before_the_others(shell: Shell) -> None:
    shell.job("--prepare", "nano")
    first, second = shell.calls("srun")
    assert "--nodes=1 --ntasks=1 " in first
    assert first.endswith("-m pipeline prepare nano")
    assert second.endswith("-m pipeline run nano")


def test_the_task_that_prepares_has_all_processors_of_its_node(shell: Shell) -> None:
    del shell.environment["OMP_NUM_THREADS"]
    done = shell.job("--prepare", "nano", SRUN='echo "$OMP_NUM_THREADS"')
    first, second = shell.calls("srun")
    assert "--cpus-per-task=16 " in first and "--cpus-per-task=4 " in second
    assert done.stdout.split() == ["16", "4"]
    chosen = shell.job("--prepare", "nano", SRUN='echo "$OMP_NUM_THREADS"', OMP_NUM_THREADS="2")
    assert chosen.stdout.split() == ["2", "2"]


@pytest.mark.parametrize(("option", "call"), [("--train", "train nano"), ("--evaluate", "evaluate nano")])
def test_training_and_evaluation_may_be_jobs_of_their_own(shell: Shell, tmp_path: Path, option: str, call: str) -> None:
    run = "nano" if option == "--train" else str(tmp_path)
    (tmp_path / "config.yaml").touch()
    shell.job(option, "nano")
    shell("--submit", option, run)
    assert shell.calls("srun")[0].endswith(f"-m pipeline {call}")
    assert shell.calls("sbatch")[0].endswith(f"{option} {run}")


def test_a_failed_preparation_ends_the_job(shell: Shell) -> None:
    assert shell.job("--prepare", "nano", SRUN="exit 2").returncode == 2
    assert len(shell.calls("srun")) == 1


def test_without_a_recipe_the_embedded_default_is_prepared_and_run(shell: Shell) -> None:
    shell.job()
    assert [call.split(" -m pipeline ")[1] for call in shell.calls("srun")] == ["prepare nano", "run nano"]


@pytest.mark.parametrize("code", [75, 138])
def test_a_stopped_sequence_is_queued_again(shell: Shell, code: int) -> None:
    done = shell.job("nano", SRUN=f"exit {code}")
    assert (done.returncode, shell.calls("scontrol")[-1]) == (75, "requeue 41")


@pytest.mark.parametrize("code", [1, 2, 137, 143])
def test_a_failed_sequence_is_not_queued_again(shell: Shell, code: int) -> None:
    done = shell.job("nano", SRUN=f"exit {code}")
    assert done.returncode == code
    assert "requeue 41" not in shell.calls("scontrol")


@pytest.mark.parametrize(
    ("state", "said"),
    [("CANCELLED", "was cancelled"), ("COMPLETING", "state is COMPLETING"), ("PREEMPTED", "state is PREEMPTED")],
)
def test_a_job_that_slurm_is_ending_is_not_queued_again(shell: Shell, state: str, said: str) -> None:
    done = shell.job("nano", SRUN="exit 75", JOB_STATE=state)
    assert done.returncode == 75
    assert said in done.stderr
    assert ("was cancelled" in done.stderr) == (state == "CANCELLED")
    assert "requeue 41" not in shell.calls("scontrol")


def test_a_busy_controller_is_asked_again(shell: Shell) -> None:
    done = shell.job("nano", SRUN="exit 75", BUSY="2")
    assert (done.returncode, shell.calls("scontrol").count("requeue 41")) == (75, 3)
    assert "queued again and goes on" in done.stderr


def test_a_job_that_must_not_be_queued_again_is_left_alone(shell: Shell) -> None:
    done = shell.job("nano", SRUN="exit 75", REQUEUE="0")
    assert done.returncode == 75
    assert "--no-requeue" in done.stderr
    assert "requeue 41" not in shell.calls("scontrol")


def test_a_job_is_not_queued_again_for_ever(shell: Shell) -> None:
    done = shell.job("nano", SRUN="exit 75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert "started 3 times again" in done.stderr
    assert "requeue 41" not in shell.calls("scontrol")


def test_a_job_that_slurm_will_not_queue_again_says_how_to_go_on(shell: Shell) -> None:
    done = shell.job("nano", SRUN="exit 75", NO_REQUEUE="1")
    assert done.returncode == 75
    assert "submit it again to resume" in done.stderr


def signalled(shell: Shell, number: int, ranks: str, *options: str, **environment: str) -> tuple[int, str]:
    """Signal a job once its ranks have started; its code and the last call of scontrol."""
    process = shell.start(*options, "nano", **JOB, SLURM_SUBMIT_DIR=str(PROJECT), SRUN=ranks, **environment)
    shell.wait_for("started", process)
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode, shell.calls("scontrol")[-1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_job_script_reaches_the_ranks_and_the_script_waits_for_them(
    shell: Shell, number: signal.Signals
) -> None:
    ranks = 'trap "sleep 0.5; exit 75" USR1; echo started >>"$CALLS"; while true; do sleep 0.05; done'
    assert signalled(shell, number, ranks) == (75, "requeue 41")


@pytest.mark.parametrize("code", [138, 143])
def test_a_step_that_dies_of_the_signal_of_a_job_told_to_stop_is_queued_again(shell: Shell, code: int) -> None:
    ranks = f'trap "exit {code}" USR1; echo started >>"$CALLS"; while true; do sleep 0.01; done'
    assert signalled(shell, signal.SIGTERM, ranks) == (75, "requeue 41")


def test_the_code_of_a_step_that_ends_while_the_script_is_busy_with_the_signal_is_kept(shell: Shell) -> None:
    ranks = 'trap "exit 75" USR1; echo started >>"$CALLS"; while true; do sleep 0.01; done'
    slowly = {"BASH_FUNC_kill%%": '() { local code=0; builtin kill "$@" || code=$?; sleep 0.3; return $code; }'}
    assert signalled(shell, signal.SIGTERM, ranks, **slowly) == (75, "requeue 41")


def test_a_signal_while_the_data_is_prepared_is_queued_again_and_trains_nothing(shell: Shell) -> None:
    ranks = 'trap "exit 0" USR1; echo started >>"$CALLS"; while true; do sleep 0.01; done'
    assert signalled(shell, signal.SIGUSR1, ranks, "--prepare") == (75, "requeue 41")
    assert len(shell.calls("srun")) == 1


def test_dry_run_in_a_job_prints_the_step_and_starts_nothing(shell: Shell) -> None:
    done = shell.job("--dry-run", "nano")
    assert done.stdout.startswith("srun --nodes=2")
    assert shell.calls("srun") == []


def test_a_chain_is_one_job_per_stage_each_after_the_one_before(shell: Shell) -> None:
    options = {"SBATCH_OPTIONS": "--nodes=2 --time=1", "PYTHON": sys.executable}
    done = shell("--chain", "--prepare", "nano", **options)
    assert done.returncode == 0, done.stderr
    calls = shell.calls("sbatch")
    first, script = "--parsable --nodes=2 --time=1", "slurm/run_sequence.sh"
    assert calls[0] == f"{first} --job-name=01-Colours {script} --prepare nano --until 1"
    assert calls[1] == f"{first} --job-name=02-Digits --dependency=afterok:101 {script} nano --until 2"
    assert "--dependency=afterok:105" in calls[5]
    assert "stage 6 (Boxes): job 106" in done.stdout


def test_a_chain_with_a_wrong_recipe_submits_nothing(shell: Shell) -> None:
    done = shell("--chain", "nanoo", PYTHON=sys.executable)
    assert (done.returncode, shell.calls("sbatch")) == (2, [])
    assert "Did you mean 'nano'?" in done.stderr


def test_outside_a_job_the_pipeline_starts_the_ranks_itself(shell: Shell) -> None:
    assert shell("nano").returncode == 0
    assert shell.calls("python-stand-in") == ["-m pipeline run nano"]
    assert shell.calls("srun") == []


@pytest.mark.parametrize("arguments", [("nano",), ("--prepare", "nano")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_outside_a_job_a_signal_to_the_script_reaches_python(
    shell: Shell, arguments: tuple[str, ...], number: signal.Signals
) -> None:
    run = 'trap "echo told >>$CALLS; exit 75" TERM HUP; echo started >>"$CALLS"; while true; do sleep 0.02; done'
    process = shell.start(*arguments, RUN=run)
    shell.wait_for("started", process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "told" in shell.calls_file.read_text("utf-8").splitlines()
    assert len(shell.calls("python-stand-in")) == 1


def test_the_shell_of_salloc_knows_its_processors_by_another_name(shell: Shell) -> None:
    environment = {**JOB, "SLURM_JOB_CPUS_PER_NODE": "16(x2)", "SLURM_GPUS_PER_NODE": "a100:4"}
    environment["SLURM_SUBMIT_DIR"] = str(PROJECT)
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE"):
        del environment[name]
    done = shell("nano", **environment)
    assert done.returncode == 0, done.stderr
    assert {"--ntasks=8", "--cpus-per-task=4"} <= set(shell.calls("srun")[0].split())


def test_options_of_site_env_may_take_several_lines(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text('SBATCH_OPTIONS="--nodes=2\n  --time=1"\nPREPARE_OPTIONS="--mem=1G\n--time=2"\n')
    shell("--submit", "nano", SITE_ENV=str(site))
    shell.prepare("--tasks", "3", "r.yaml", SITE_ENV=str(site))
    calls = shell.calls("sbatch")
    assert calls[0].startswith("--parsable --nodes=2 --time=1 slurm/")
    assert all(" --mem=1G --time=2 " in call for call in calls[1:])


def test_site_env_may_end_its_lines_as_windows_does(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_bytes(b'SBATCH_OPTIONS="--nodes=2\r\n --time=1"\r\nPYTHON=python-stand-in\r\n')
    del shell.environment["PYTHON"]
    shell("--submit", "nano", SITE_ENV=str(site))
    shell.job("nano", SITE_ENV=str(site))
    assert shell.calls("sbatch")[0].startswith("--parsable --nodes=2 --time=1 slurm/")
    assert " python-stand-in -m pipeline run nano" in shell.calls("srun")[0]
    assert "\r" not in shell.calls_file.read_bytes().decode()


def test_what_bash_and_make_read_keeps_its_line_ends_in_a_clone_on_windows() -> None:
    rules = (PROJECT / ".gitattributes").read_text().splitlines()
    assert {"*.sh text eol=lf", "Makefile text eol=lf", "slurm/site.env.example text eol=lf"} <= set(rules)


def test_site_env_may_read_what_is_not_set(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text('module() { echo "$MODULE_NOBODY_SET" >/dev/null; }\nmodule load cuda\n')
    assert shell("nano", SITE_ENV=str(site)).returncode == 0


def test_a_chain_with_pyxis_reads_the_recipe_outside_the_container(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(f"CONTAINER=pyxis IMAGE=/i.sqsh PYTHON=/only/inside/python LOGIN_PYTHON={sys.executable}\n")
    done = shell("--chain", "nano", SITE_ENV=str(site))
    assert done.returncode == 0, done.stderr
    assert len(shell.calls("sbatch")) == 6
    site.write_text("CONTAINER=pyxis IMAGE=/i.sqsh PYTHON=python3 LOGIN_PYTHON=/not/there\n")
    done = shell("--chain", "nano", SITE_ENV=str(site))
    assert (done.returncode, len(shell.calls("sbatch"))) == (2, 6)
    assert "LOGIN_PYTHON, in slurm/site.env" in done.stderr


def test_outside_a_job_dry_run_prints_the_command(shell: Shell) -> None:
    assert shell("--dry-run", "nano").stdout.split() == "python-stand-in -m pipeline run nano".split()
    assert shell.calls("python-stand-in") == []


def test_site_env_says_container_network_and_mounts(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("CONTAINER=pyxis IMAGE=/i.sqsh MOUNTS=/data:/data NETWORK_INTERFACE=ib0 PYTHON=python3\n")
    done = shell.job("nano", SITE_ENV=str(site), SRUN='echo "$NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME"')
    (call,) = shell.calls("srun")
    assert (
        f"--container-image=/i.sqsh --container-workdir={PROJECT} --container-mounts={PROJECT}:{PROJECT},/data:/data"
        in call
    )
    assert call.endswith(" python3 -m pipeline run nano")
    assert done.stdout.split() == ["ib0", "ib0"]


def test_apptainer_runs_the_python_of_its_image(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("CONTAINER=apptainer IMAGE=/i.sif PYTHON=python3\n")
    shell.job("nano", SITE_ENV=str(site))
    wanted = f" apptainer exec --nv --bind {PROJECT} --pwd {PROJECT} /i.sif python3 -m pipeline run nano"
    assert shell.calls("srun")[0].endswith(wanted)


@pytest.mark.parametrize(
    ("line", "said"), [("CONTAINER=docker", "expected none, apptainer or pyxis"), (None, "SITE_ENV names")]
)
def test_a_wrong_site_env_is_named(shell: Shell, tmp_path: Path, line: str | None, said: str) -> None:
    site = tmp_path / "site.env"
    if line is not None:
        site.write_text(f"{line}\n")
    done = shell("nano", SITE_ENV=str(site))
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    "path", [*PROJECT.glob("slurm/*.sh"), *PROJECT.glob("tests/slurm/*.sh")], ids=lambda path: path.name
)
def test_shell_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; `make test-slurm` installs it")
    done = subprocess.run(["shellcheck", "-x", str(path)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_data_is_prepared_by_two_arrays_with_a_job_after_each(shell: Shell) -> None:
    done = shell.prepare("--tasks", "3", "r.yaml", PREPARE_OPTIONS="--mem=1G", KEYS_OPTIONS="--gpus=1")
    assert done.returncode == 0, done.stderr
    script = "slurm/prepare_array.sh --step"
    assert [call.removeprefix("--parsable --job-name=prepare-") for call in shell.calls("sbatch")] == [
        f"shards --mem=1G --array=1-3 {script} shards --tasks 3 r.yaml",
        f"join --mem=1G --dependency=afterok:101 {script} join --tasks 3 r.yaml",
        f"keys --gpus=1 --array=1-3 --dependency=afterok:102 {script} keys --tasks 3 r.yaml",
        f"together --mem=1G --dependency=afterok:103 {script} together --tasks 3 r.yaml",
    ]


@pytest.mark.parametrize("option", [("--skip-bad", "10"), ("--skip-bad=10",), ("--set", "data.skip_bad=10")])
def test_bad_records_are_left_out_by_one_process_alone(shell: Shell, option: tuple[str, ...]) -> None:
    done = shell.prepare("r.yaml", *option)
    assert (done.returncode, shell.calls("sbatch")) == (2, [])
    assert "prepare this recipe in one job: python -m pipeline prepare RECIPE --skip-bad N." in done.stderr


@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("shards", "data_prep shards r.yaml --share 2/3"),
        ("join", "data_prep join r.yaml"),
        ("keys", "data_prep keys r.yaml --share 2/3"),
        ("together", "pipeline prepare r.yaml"),
    ],
)
def test_every_job_of_the_preparation_does_its_share(shell: Shell, step: str, call: str) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_SUBMIT_DIR": str(PROJECT)}
    assert shell.prepare("--step", step, "--tasks", "3", "r.yaml", SLURM_CPUS_PER_TASK="8", **task).returncode == 0
    assert shell.calls("srun")[0].endswith(f"python-stand-in -m {call}")
    assert "--cpus-per-task=8" in shell.calls("srun")[0].split()  # srun does not inherit it


COMPARED = ("nano", "--methods", "joint,lora", "--seeds", "0,1")


def test_methods_are_compared_by_an_array_of_runs_and_a_job_for_the_page(shell: Shell) -> None:
    done = shell.compare(*COMPARED, RUN="echo 4", COMPARE_OPTIONS="--gpus-per-node=2")
    assert done.returncode == 0, done.stderr
    script, given = "slurm/compare_array.sh --step", " ".join(COMPARED)
    assert shell.calls("python-stand-in") == [f"-m pipeline compare {given} --count"]
    assert [call.removeprefix("--parsable --job-name=compare-") for call in shell.calls("sbatch")] == [
        f"runs --gpus-per-node=2 --array=1-4 {script} runs --of 4 {given}",
        f"page --gpus-per-node=2 --dependency=afterany:101 {script} page --of 4 {given}",
    ]


def test_a_comparison_that_is_wrong_submits_nothing(shell: Shell) -> None:
    assert shell.compare(*COMPARED, RUN="exit 2").returncode == 2
    assert not shell.calls("sbatch")


@pytest.mark.parametrize(("step", "call"), [("runs", "--share 2/4"), ("page", "--only-page")])
def test_every_job_of_a_comparison_does_its_share(shell: Shell, step: str, call: str) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_SUBMIT_DIR": str(PROJECT)}
    assert shell.compare("--step", step, "--of", "4", *COMPARED, **task).returncode == 0
    assert shell.calls("srun")[0].endswith(f"python-stand-in -m pipeline compare {' '.join(COMPARED)} {call}")


def test_a_compared_run_is_told_before_the_time_limit_and_queued_again(shell: Shell) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    waits = "trap 'exit 75' TERM; while true; do sleep 0.05; done"
    given = ("--step", "runs", "--of", "4", *COMPARED)
    process = shell.start(*given, script="compare_array.sh", SRUN=waits, SLURM_SUBMIT_DIR=str(PROJECT), **task)
    shell.wait_for("srun", process)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert shell.calls("scontrol") == ["requeue 5_2"]
