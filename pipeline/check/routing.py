"""The check of what routing needs of prepared tasks: finite keys, and as many samples as the router's statistics."""

from __future__ import annotations

from pipeline.check.findings import Findings
from pipeline.config.data import DataConfig
from pipeline.config.method import MethodOptions
from pipeline.data.keys import join_keys
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.errors import UserError, UserErrors
from pipeline.methods import make_method
from pipeline.prompts.routers.kept_keys import require_finite

TITLE = "routing"


def keeps_keys(method: MethodOptions) -> bool:
    """Whether tasks keep routing keys; False where the method's parts do not go together, as another check says."""
    try:
        return make_method(method).routing.keeps_keys
    except UserError:
        return False


def check_routing(findings: Findings, method: MethodOptions, data: DataConfig) -> str:
    """What the tasks of a method that `keeps_keys` keep, in words; a warning for tasks with too few samples.

    Raises UserErrors for tasks whose keys are not finite. Tasks that are not prepared are passed over.
    """
    routing = make_method(method).routing
    router = routing.router
    assert router is not None
    wrong, short = [], []
    for task in data.tasks:
        folder = data.split_path(task.name, "train")
        if not (folder / DATASET_FILE).is_file():
            continue
        try:
            keys = IndexedShards(folder).keys()
        except UserError:  # the check of the data says so
            continue
        count = min(task.limit_train or len(keys.text), len(keys.text))
        try:
            require_finite(join_keys([(keys, count)]), f"the task {task.name}")
        except UserError as error:
            wrong.append(str(error))
        if count < router.fewest:
            short.append(f"{task.name} ({count})")
    if wrong:
        raise UserErrors(wrong)
    if router.needs_keys and short:
        findings.warnings[TITLE] = [
            f"The router {router.word} needs {router.fewest} training samples of each task. As long as one has fewer, "
            f"samples are routed by the means of the tasks' keys: {', '.join(short)}."
        ]
    return f"{router.word}; a task keeps the routing keys of up to {routing.keys_per_task} training samples"
