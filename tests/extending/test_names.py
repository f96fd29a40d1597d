"""What may be named where: a recipe may name a target, files from elsewhere only what is registered."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.adapter.format import read_adapter
from pipeline.adapter.registry import CONTENT, register_run
from pipeline.backbones.lmm_families import family_of
from pipeline.clip.benchmark.checkpoint import LearnedPrompts, learner_from
from pipeline.config import registry
from pipeline.config.method import method_options
from pipeline.config.task_file import TASK_FILE, read_task_file
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.tracking.tracker import StoredRun
from tests.adapters import save_adapter, save_models

TARGET = "a_module_of_a_stranger:Rule"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", {})
    yield


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that could be imported, with a rule in it."""
    source = (
        "from pipeline.data.selection import Selection\nfrom pipeline.prompts.rules import Rule as Base\n"
        "class Rule(Base):\n    def inference(self, scores, tasks):\n        return Selection.none(len(scores))\n"
    )
    (tmp_path / "a_module_of_a_stranger.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "a_module_of_a_stranger"
    sys.modules.pop("a_module_of_a_stranger", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    return save_adapter(root / "adapter", save_models(root / "models"))


def changed(adapter: Path, target: Path, **method: Any) -> Path:
    """A copy of an adapter's description whose method says something else."""
    content = json.loads((adapter / "adapter.json").read_text())
    content["method"] |= method
    target.mkdir()
    (target / "adapter.json").write_text(json.dumps(content))
    for path in adapter.glob("*.safetensors"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    "method", [{"name": TARGET}, {"selection": TARGET}, {"selection": {"name": TARGET}}, {"unknown": [{"x": TARGET}]}]
)
def test_an_adapter_imports_nothing_because_it_says_so(
    whole: Path, tmp_path: Path, stranger: str, method: dict[str, Any]
) -> None:
    adapter = changed(whole, tmp_path / "adapter", **method)
    with pytest.raises(UserError, match=rf"adapter\.json names '{TARGET}', which would be imported.*register"):
        read_adapter(adapter)
    assert stranger not in sys.modules


def test_an_adapter_may_name_a_target_that_the_user_has_registered(
    whole: Path, tmp_path: Path, stranger: str, registered: None
) -> None:
    registry.register("rules", TARGET, TARGET)
    method = make_method(read_adapter(changed(whole, tmp_path / "adapter", selection=TARGET)).meta.method)
    assert type(method.routing.rule).__module__ == stranger


def test_a_run_whose_recipe_names_a_target_is_registered(
    whole: Path, tmp_path: Path, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Client:
        def search_model_versions(self, wanted: str) -> list[Any]:
            asked.append(wanted)
            return [SimpleNamespace(tags={CONTENT: read_adapter(whole).pool.whole_fingerprint()})]

    monkeypatch.setattr(
        "pipeline.adapter.registry.export", lambda run, target: changed(whole, target, selection=TARGET)
    )
    register_run(StoredRun(Client(), "", "", ""), tmp_path, "small", 0)
    assert asked == ["name = 'small'"]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"name": "theirs"}, "needs the method 'theirs'; install the package .* continual_prompts.methods"),
        ({"selection": "theirs"}, "needs the selection rule 'theirs'; install the package .* continual_prompts.rules"),
    ],
)
def test_an_adapter_says_which_package_is_missing(
    whole: Path, tmp_path: Path, method: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_adapter(changed(whole, tmp_path / "adapter", **method))


def test_a_recipe_may_name_a_target(stranger: str) -> None:
    method = make_method(method_options(name="modalprompt", selection=TARGET))
    assert type(method.routing.rule).__module__ == stranger


@pytest.mark.parametrize(
    ("kind", "target", "sentence"),
    [
        ("rules", "os:system", "expected a subclass of pipeline.prompts.rules.base.Rule"),
        ("metrics", "os:system", "expected an instance of pipeline.metrics.metric.Metric"),
        ("methods", "pathlib:Path", "expected a subclass of pipeline.methods.base.Method"),
        ("sources", "pathlib:Path", "expected a subclass of data_prep.sources.base.SourceSplit"),
        ("rules", "no_such_module:Rule", "cannot be imported .*no_such_module"),
        ("rules", "pathlib:NoSuchName", "cannot be imported .*NoSuchName"),
        ("rules", "nearest two", "There is no selection rule 'nearest two'"),
    ],
)
def test_what_a_target_has_to_be(kind: str, target: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        registry.load(kind, target)


def test_a_module_that_fails_when_it_is_imported_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_example.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported \(ZeroDivisionError: division by zero"):
        registry.load("rules", "broken_example:Rule")


def test_a_registered_name_stands_for_the_object(registered: None) -> None:
    from pipeline.metrics.metric import PerAnswer

    metric = PerAnswer(lambda prediction, answer, meta: 1.0)
    registry.register("metrics", "always", metric)
    assert registry.load("metrics", "always") is metric
    with pytest.raises(UserError, match="There is a metric 'always' already"):
        registry.register("metrics", "always", "other:metric")
    with pytest.raises(UserError, match="There is a metric 'exact' already"):
        registry.register("metrics", "exact", metric)


def test_a_task_file_names_no_target(tmp_path: Path, stranger: str) -> None:
    (tmp_path / TASK_FILE).write_text(json.dumps({"metric": TARGET}))
    with pytest.raises(UserError, match="which would be imported; expected a metric's name"):
        read_task_file(tmp_path)
    assert stranger not in sys.modules


def test_checkpoints_name_no_target(stranger: str) -> None:
    with pytest.raises(UserError, match="The model is of type"):
        family_of(TARGET)
    with pytest.raises(UserError, match="which this version does not know; install the package"):
        learner_from(LearnedPrompts({}, {"method": TARGET, "options": {}}), None)  # type: ignore[arg-type]
    assert stranger not in sys.modules


def test_a_metric_that_gives_no_share_of_one_is_refused(registered: None) -> None:
    from pipeline.metrics.metric import Answered, Corpus, PerAnswer, TaskScore
    from pipeline.metrics.scoring import score_task

    registry.register("metrics", "percentages", PerAnswer(lambda prediction, answer, meta: 100.0))
    registry.register("metrics", "short", Corpus(lambda answered: TaskScore(0.0, {}, [])))
    registry.register("metrics", "undefined", Corpus(lambda answered: TaskScore(float("nan"), {}, [0.0])))
    for name, sentence in (
        ("percentages", "scored an answer with 100.0; expected a number from 0 to 1"),
        ("short", "gave 0 points to 1 answers"),
        ("undefined", "no finite number"),
    ):
        with pytest.raises(UserError, match=sentence):
            score_task(name, [Answered("a", "a")])


def test_a_metric_whose_package_is_missing_is_refused_before_a_run(registered: None) -> None:
    from pipeline.metrics.metric import PerAnswer
    from pipeline.metrics.scoring import require_metrics

    registry.register("metrics", "needy", PerAnswer(lambda p, a, m: 1.0, needs=("no_such_package",)))
    with pytest.raises(UserError, match="needs the package no_such_package"):
        require_metrics(["exact", "needy"])


def test_an_unknown_name_may_be_one_of_a_package_that_is_missing() -> None:
    with pytest.raises(UserError, match="or a name that a package gives once it is installed here"):
        registry.load("rules", "nearest_seven")
