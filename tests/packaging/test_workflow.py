"""What runs on every change: the workflow does what .ci/run does and more, and the hooks are those of `make lint`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.processes import PROJECT

GITHUB = PROJECT / ".github"
WORKFLOW = GITHUB / "workflows" / "ci.yml"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def load(path: Any) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(job: dict[str, Any]) -> list[str]:
    """The commands of a job, for every entry of its matrix."""
    entries = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    commands = [step["run"] for step in job["steps"] if "run" in step]
    return [filled_in(command, entry) for entry in entries for command in commands]


def filled_in(command: str, entry: dict[str, Any]) -> str:
    """The command with what an entry of the matrix has in place of `${{ matrix.NAME }}`."""
    return re.sub(r"\$\{\{ *matrix\.(\w+) *\}\}", lambda found: str(entry[found[1]]), command)


def test_every_step_of_the_script_is_a_job() -> None:
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = re.findall(r"^make .+$", script, re.MULTILINE)
    runs = steps(load(WORKFLOW)["jobs"]["make"])
    jobs = [run for run in runs if run.startswith("make ") and run != "make venv"]
    longer = {"make test-slow", "make test-slurm", "make test-vllm", "make test-lmms"}
    assert wanted and jobs[: len(wanted)] == wanted and longer <= set(jobs)


def test_the_targets_of_the_workflow_are_there() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = {word.split()[1] for word in steps(load(WORKFLOW)["jobs"]["make"]) if word.startswith("make ")}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_actions_are_pinned_to_a_commit_and_say_its_version() -> None:
    used = re.findall(r"uses: (.+)", WORKFLOW.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_the_workflow_reads_only() -> None:
    workflow = load(WORKFLOW)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML 1.1 reads `on` as true


def test_the_hooks_use_the_ruff_of_make_lint() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (PROJECT / "requirements-dev.txt").read_text("utf-8"), re.MULTILINE))
    hooks = {hook["repo"].rsplit("/", 1)[1]: hook for hook in load(PROJECT / ".pre-commit-config.yaml")["repos"]}
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pins['ruff']}"
    assert [hook["id"] for hook in hooks["ruff-pre-commit"]["hooks"]] == ["ruff-check", "ruff-format"]
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", repository["rev"]) for repository in hooks.values())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_questions(form: Any) -> None:
    content = load(form)
    assert {"name", "description", "body"} <= set(content)
    fields = content["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("textarea", "checkboxes", "input", "dropdown"), field
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)
