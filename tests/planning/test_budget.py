"""A budget of trained values decides the size of a method's module, on whatever model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.planning.budget import decoder_of, trained_values, within_budget
from pipeline.prompts.parts.base import kind_of

NANO = load_recipe("nano")


def recipe(method: str, budget: int, **options: Any) -> Recipe:
    sets = [f"method.name={method}", f"train.budget={budget}", *(f"method.{name}={v}" for name, v in options.items())]
    return load_recipe("nano", sets)


def test_the_rank_or_length_is_the_largest_within_the_budget() -> None:
    width = decoder_of(NANO.model, NANO.keys).width
    assert within_budget(recipe("independent", 10 * width)).method.prompt_length == 10  # type: ignore[attr-defined]
    assert within_budget(recipe("independent", 11 * width - 1)).method.prompt_length == 10  # type: ignore[attr-defined]
    for budget in (20_000, 100_000):
        sized = within_budget(recipe("task_lora", budget))
        more = sized.model_copy(update={"method": sized.method.model_copy(update={"rank": sized.method.rank + 1})})  # type: ignore[attr-defined]
        assert trained_values(sized) <= budget < trained_values(more)


def test_an_update_counts_as_much_at_every_rank() -> None:
    plain = recipe("task_lora", 1, rank=8).method
    for budget in (20_000, 100_000):
        sized = within_budget(recipe("task_lora", budget)).method
        assert sized.alpha / sized.rank == pytest.approx(plain.alpha / plain.rank)  # type: ignore[attr-defined]


def test_a_part_beside_its_name_is_sized_too() -> None:
    sized = within_budget(recipe("independent", 20_000, part="low_rank"))
    assert sized.method.part["name"] == "low_rank" and trained_values(sized) <= 20_000  # type: ignore[attr-defined]
    assert within_budget(sized) == sized


def test_a_sized_recipe_comes_out_the_same(tmp_path: Path) -> None:
    sized = within_budget(recipe("task_lora", 50_000))
    sized.dump_yaml(tmp_path / "config.yaml")
    again = within_budget(load_recipe(tmp_path / "config.yaml"))
    assert again.model_dump() == sized.model_dump()


def test_a_later_rank_or_length_overrules_the_budget() -> None:
    assert load_recipe("nano", ["train.budget=960", "method.prompt_length=4"]).train.budget is None


def test_without_a_budget_or_a_module_nothing_changes() -> None:
    assert within_budget(NANO) is NANO
    frozen = recipe("zero_shot", 100)
    assert within_budget(frozen) is frozen and trained_values(frozen) == 0


@pytest.mark.parametrize("name", list(registry.BUILT_IN["methods"]))
def test_every_method_keeps_within_a_budget_or_says_that_it_is_too_small(name: str) -> None:
    if make_method(recipe(name, 1).method).part is None:
        return
    with pytest.raises(UserError, match=rf"train\.budget: found 1 trained values.*the method {name} has [\d,]+ on"):
        within_budget(recipe(name, 1))
    sizes = []
    for budget in (150_000, 1_500_000):
        sized = within_budget(recipe(name, budget))
        sizes.append(trained_values(sized))
        assert budget / 3 < sizes[-1] <= budget
    assert sizes[0] < sizes[1]


def test_a_part_without_a_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = recipe("independent", 1_000)
    monkeypatch.setattr(kind_of(make_method(small.method)), "sized_by", "")
    with pytest.raises(
        UserError, match="the part input_rows of the method independent has no option of which its size"
    ):
        within_budget(small)
