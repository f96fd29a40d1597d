"""Adapters whose tasks are found by closed-form routers: merged, pruned, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapter import load_adapter
from pipeline.adapter.answering import Answerer
from pipeline.adapter.edit import merge, prune
from pipeline.adapter.fitted_routing import FITTED
from pipeline.adapter.format import read_adapter
from pipeline.adapter.meta import META
from pipeline.errors import UserError
from tests.adapter.edited import with_tensors
from tests.adapters import Models, question, save_adapter, save_models

RANDOM = {"name": "random_ridge", "width": 16}
ROUTERS: list[Any] = ["mean", "centres", "ridge", RANDOM]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def saved(folder: Path, models: Models, numbers: tuple[int, ...], router: Any = "ridge", **method: Any) -> Path:
    return save_adapter(folder, models, numbers, **{"router": router, "gate": None, "unfamiliar": "flag", **method})


def routed(folder: Path | Answerer) -> dict[str, Any]:
    """Scores and probabilities of some questions by set, and whether they are unfamiliar."""
    answerer = load_adapter(folder) if isinstance(folder, Path) else folder
    found = answerer.route([question(n, 3, with_image) for n in range(4) for with_image in (True, False)])
    assert found.probabilities is not None and found.unfamiliar is not None
    columns = zip(answerer.pool.names, found.scores.T, found.probabilities.T, strict=True)
    return {"unfamiliar": found.unfamiliar, **{name: torch.stack([one, two]) for name, one, two in columns}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_merged_and_pruned_adapters_route_as_one_with_those_tasks(models: Models, tmp_path: Path, router: Any) -> None:
    whole = saved(tmp_path / "whole", models, (0, 1, 2, 3), router)
    first, second = (saved(tmp_path / name, models, n, router) for name, n in (("a", (2, 0)), ("b", (3, 1))))
    merge([first, second], tmp_path / "merged")
    assert_same(routed(tmp_path / "merged"), routed(whole))
    prune(tmp_path / "merged", ["T2"], tmp_path / "pruned")
    assert_same(routed(tmp_path / "pruned"), routed(saved(tmp_path / "without", models, (0, 1, 3), router)))
    merged, kept = read_adapter(tmp_path / "merged").pool, read_adapter(first).pool
    for one, two in zip(merged.states, kept.states, strict=False):
        assert all(torch.equal(one[name], value) and one[name].dtype == value.dtype for name, value in two.items())


def test_adapters_of_different_routers_or_options_are_not_merged(models: Models, tmp_path: Path) -> None:
    one = saved(tmp_path / "one", models, (0, 1))
    other = saved(tmp_path / "other", models, (2, 3), RANDOM, unfamiliar="zero_shot")
    with pytest.raises(UserError, match=r"method\.unfamiliar 'zero_shot' instead of 'flag'.*method\.router \{'name'"):
        merge([one, other], tmp_path / "both")
    wider = saved(tmp_path / "wider", models, (2, 3), {"name": "ridge", "ridge": 0.5})
    with pytest.raises(UserError, match=r"method\.router \{'name': 'ridge', 'ridge': 0\.5\} instead of 'ridge'"):
        merge([one, wider], tmp_path / "both")
    more = saved(tmp_path / "more", models, (2, 3), keys_per_task=5)  # how many keys a task keeps is its own affair
    merge([one, more], tmp_path / "both")
    assert [len(state["keys.text"]) for state in read_adapter(tmp_path / "both").pool.states] == [12, 12, 5, 5]


def test_an_unknown_router_is_named(models: Models, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", models, (0, 1))
    meta = json.loads((folder / META).read_text())
    meta["method"]["router"] = "forest"
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"needs the router 'forest'; install the package"):
        load_adapter(folder)


def test_an_adapter_of_a_newer_format_says_so(models: Models, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", models, (0, 1))
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(UserError, match="format 99, expected 2 or 3; it was written by a newer version"):
        load_adapter(folder)


def test_an_adapter_of_the_format_before_has_the_learned_router(models: Models, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", models, (0, 1))
    meta = json.loads((folder / META).read_text())
    for name in ("router", "share", "unfamiliar", "keys_per_task"):
        del meta["method"][name]
    (folder / META).write_text(json.dumps({**meta, "format": 2}))
    answerer = load_adapter(folder)
    assert answerer.source.method.router == "prototype"  # type: ignore[attr-defined]
    answer = answerer.answer([question(1)])[0]
    assert answer.selected[-1] == "T1" and answer.probability is None and answer.unfamiliar is None


def test_a_large_adapter_has_its_fit_beside_it_and_answers_alike(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = saved(tmp_path / "plain", models, (0, 1, 2))
    monkeypatch.setattr("pipeline.adapter.fitted_routing.LARGE", 3)
    large = saved(tmp_path / "large", models, (0, 1, 2))
    assert (large / FITTED).is_file() and not (plain / FITTED).exists()
    expected = routed(plain)

    def fits_again(*_: object) -> None:
        raise AssertionError("the router was fitted again")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prompts.routers.ridge.Ridge.fit", fits_again)
        patch.setattr("pipeline.prompts.routing.calibrate", fits_again)
        assert_same(routed(large), expected)
    merge([large, saved(tmp_path / "other", models, (3,))], tmp_path / "merged")
    assert_same(routed(tmp_path / "merged"), routed(saved(tmp_path / "four", models, (0, 1, 2, 3))))
    prune(tmp_path / "merged", ["T3", "T2"], tmp_path / "pruned")
    assert not (tmp_path / "pruned" / FITTED).exists()
    (large / FITTED).write_bytes(b"other")
    with pytest.raises(UserError, match=r"routing\.safetensors is missing or not the file"):
        load_adapter(large)


def test_an_adapter_of_somebody_else_with_unusable_routing_keys_is_refused(models: Models, tmp_path: Path) -> None:
    def no_numbers(tensors: dict[str, torch.Tensor]) -> None:
        tensors["router.1.keys.text"][0, 0] = float("nan")

    def fewer_images(tensors: dict[str, torch.Tensor]) -> None:
        tensors["router.1.keys.image"] = tensors["router.1.keys.image"][:3].clone()

    def no_images(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["router.1.keys.image"]

    for number, change in enumerate((no_numbers, fewer_images, no_images)):
        folder = saved(tmp_path / str(number), models, (0, 1))
        with_tensors(folder, change)
        with pytest.raises(UserError, match="what the set 'T1' keeps for routing is not finite or not of one"):
            load_adapter(folder)
    folder = saved(tmp_path / "more", models, (0, 1))
    with_tensors(folder, lambda tensors: tensors.update({"router.7.keys.text": torch.zeros(1, 2)}))
    with pytest.raises(UserError, match=r"the tensors of .* cannot be read"):
        load_adapter(folder)
