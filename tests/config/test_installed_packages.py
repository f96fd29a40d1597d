"""Installed packages: a broken one harms nobody who does not name it, and a name has one meaning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.cli.recipe_fields import dotted_fields
from pipeline.clip.recipe import ClipMethodConfig
from pipeline.config import registry
from pipeline.config.load import load_recipe
from pipeline.config.method import method_options
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.report.predictions import similarity_distributions
from pipeline.runs.folder import RunFolder

NEEDY = '''
"""A method that says nothing by default."""

from pydantic import Field

from pipeline.methods.base import Method, PromptOptions


class Options(PromptOptions):
    temperature: float = Field(gt=0)


class Needy(Method):
    Options = Options
    rule = "own"
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for packages; what was found before it is found anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    yield tmp_path
    registry._entry_points.cache_clear()


def install(site: Path, package: str, code: str, points: str) -> None:
    """Put a package there that has the entry points `points`, lines of their file."""
    (site / f"{package}.py").write_text(code)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def broken(site: Path) -> None:
    install(site, "old_package", "import gone_with_an_update", "[continual_prompts.methods]\nold = old_package:Old\n")


@pytest.mark.usefixtures("broken")
def test_a_package_that_cannot_be_imported_is_told_to_those_who_name_it() -> None:
    with pytest.raises(UserError, match=r"recipe 'nano': method\.name: .*old_package:Old, which cannot be imported"):
        load_recipe("nano", ["method={name: old}"])


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method.kk=2", "the method modalprompt has no option 'kk'"),
        ("train.lr_prompts=2", "unknown field 'train.lr_prompts'"),
        ("nothing=2", "unknown field 'nothing'"),
    ],
)
def test_it_is_not_told_of_recipes_that_do_not(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_recipe("nano", [override])


def test_it_is_not_told_of_benchmarks_that_do_not(site: Path) -> None:
    install(site, "old_package", "import gone", "[continual_prompts.clip_methods]\nold = old_package:Old\n")
    with pytest.raises(ValidationError, match="per_class belongs to coop; vpt learns one context"):
        ClipMethodConfig.model_validate({"name": "vpt", "per_class": True})


@pytest.mark.usefixtures("broken")
def test_fields_are_completed_without_it() -> None:
    assert "old" in dotted_fields({})["method.name"] and "method.k" in dotted_fields({})


def test_two_packages_with_one_name_are_refused_where_it_is_used(site: Path) -> None:
    code = "from pipeline.prompts.rules.fixed import All\n\n\nclass Mine(All):\n    pass\n"
    for package in ("one", "other"):
        install(site, package, code, f"[continual_prompts.rules]\nmine = {package}:Mine\n")
    with pytest.raises(UserError, match="'mine' is one:Mine by one and other:Mine by other; expected one package"):
        registry.load("rules", "mine")
    assert registry.load("rules", "other:Mine").__name__ == "Mine"


@pytest.mark.parametrize("name", ["needy", "needy_package:Needy", "old"])
@pytest.mark.usefixtures("broken")
def test_a_report_asks_the_method_with_the_options_of_the_run(site: Path, name: str) -> None:
    install(site, "needy_package", NEEDY, "[continual_prompts.methods]\nneedy = needy_package:Needy\n")
    options = {"name": name, "temperature": 2.0}
    if name != "old":
        assert make_method(method_options(options)).name == name, "run.json, cards and tables name it so"
    run = RunFolder(
        path=site, config={"method": options}, state={"method": name},
        tasks=["T0", "T1"], accuracy=[[0.0, None], [0.0, 0.0]], zero_shot=None, routing={}, majority=None, ahead=None,
    )  # fmt: skip
    eval_ = site / "eval" / "after-02"
    eval_.mkdir(parents=True)
    (eval_ / "T0.jsonl").write_text('{"id": "1", "prediction": "a", "answer": "a", "similarity": [0.5, 0.1]}\n')
    found = similarity_distributions(run)
    assert bool(found) == (name == "old"), "one that cannot be asked is taken at its word"
