"""L2P and DualPrompt against their formulas written out: losses and values of two stages, and what a stage changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, StageData, collate_prompts
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.methods import Method, make_method
from pipeline.prompts.embedding import embed_with_rows
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.dual_prefix import DualOptions
from pipeline.prompts.pool import PromptPool
from pipeline.sequence.engine import learner_of
from tests import tiny
from tests.prompts import deep_reference, prefix_reference
from tests.prompts.stages import (
    SAMPLES,
    Values,
    assert_same,
    stage_batch,
    trained_by_formulas,
    trained_by_project,
)
from tests.training.worlds import KEY_WIDTH, make_samples

L2P = {"name": "l2p", "pool_size": 4, "pool_length": 2, "chosen": 2, "pull": 0.3}
DUAL = {
    "name": "dualprompt",
    "general_length": 2,
    "task_length": 3,
    "general_layers": [0, 1],
    "task_layers": [1, 2],
    "pull": 0.7,
}
MODULAR = {"name": "modular", "prompt_length": 2, "depth": 3, "add": 2, "remove": 1, "k": 2}
PREFIX = {"name": "independent", "part": {"name": "prefix", "prefix_length": 3}}
CODA = {"name": "coda", "components": 2, "component_length": 3, "layers": [0, 2], "ortho": 0.4}


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> LMM:
    folder = tmp_path_factory.mktemp("methods") / "llava"
    folder.mkdir()
    return load_lmm(ModelConfig(path=str(tiny.save_llava(folder, layers=3))))


def made(fields: dict[str, Any], **more: Any) -> Method:
    return make_method(method_options({**fields, **more}))


def samples_of(lmm: LMM, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Of each sample the embeddings [N, D] of its tokens and its labels [N]."""
    found, pictured = [], 0
    for sample in range(len(batch.ids)):
        kept, has_image = batch.attention[sample].bool(), batch.has_image[sample]
        ids = batch.input_ids[sample][kept]
        image = {"pixel_values": batch.images["pixel_values"][pictured : pictured + 1]}
        pictured += int(has_image)
        tokens = lmm.embed(ids[None], image, has_image[None])[0] if has_image else lmm.words(ids)
        found.append((tokens, batch.labels[sample][kept]))
    return found


def queries(batch: Batch) -> Tensor:
    """[g_v; g_x] of unit keys, without the image's where there is none, divided by its length [B, 2 K]."""
    image = batch.image_key / batch.image_key.norm(dim=1, keepdim=True).clamp_min(1e-12) * batch.has_image[:, None]
    both = torch.cat([image, batch.text_key / batch.text_key.norm(dim=1, keepdim=True)], dim=1)
    return both / both.norm(dim=1, keepdim=True)


def nll(lmm: LMM, hidden: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(lmm.logits(hidden)[:-1], labels[1:], reduction="sum")


def l2p_loss(lmm: LMM) -> Any:
    def loss(values: Values, _: PromptPool, batch: Batch) -> Tensor:
        keys, asked = values["pool.keys"], queries(batch)
        similarity = (asked @ keys.T) / keys.norm(dim=1)
        language, pulled = torch.zeros(()), torch.zeros(())
        for sample, (tokens, labels) in enumerate(samples_of(lmm, batch)):
            best = similarity[sample].argsort(descending=True)[: L2P["chosen"]]
            rows = torch.cat([values["pool.prompts"][number] for number in best])
            hidden = deep_reference.hidden_of(lmm, tokens, 1, [[rows]], [deep_reference.Op(add=len(rows))])
            language = language + nll(lmm, hidden, labels)
            pulled = pulled + (1 - similarity[sample][best]).sum()
        return language / batch.counts()[0] + 0.3 * pulled / SAMPLES

    return loss


def dual_loss(lmm: LMM) -> Any:
    def loss(values: Values, _: PromptPool, batch: Batch) -> Tensor:
        prefixes: dict[int, list[prefix_reference.Part]] = {0: [], 1: [], 2: []}
        for layers, begin in (([0, 1], "shared.prefix."), ([1, 2], "prefix.")):
            for n in layers:
                prefixes[n].append(prefix_reference.Part(values[f"{begin}{n}.keys"], values[f"{begin}{n}.values"]))
        language = torch.zeros(())
        for tokens, labels in samples_of(lmm, batch):
            language = language + nll(lmm, prefix_reference.hidden_of(lmm, tokens, prefixes), labels)
        key = values["task_key"][0]
        return language / batch.counts()[0] + 0.7 * (1 - queries(batch) @ key / key.norm()).mean()

    return loss


def coda_loss(lmm: LMM) -> Any:
    def loss(values: Values, pool: PromptPool, batch: Batch) -> Tensor:
        asked, ortho = queries(batch), torch.zeros(())
        all_of: dict[int, dict[str, Tensor]] = {}
        for n in (0, 2):
            found = {}
            for end in ("component_keys", "component_values", "match", "attention"):
                name = f"prefix.{n}.{end}"
                old = pool.tensors[name].flatten(0, 1) if name in pool.tensors else values[name][:0]
                found[end] = torch.cat([old, values[name]])
            all_of[n] = found
            prefix = torch.cat([found["component_keys"].flatten(1), found["component_values"].flatten(1)], dim=1)
            for rows in (found["match"], found["attention"], prefix):
                ortho = ortho + ((rows @ rows.T - torch.eye(len(rows))) ** 2).mean()
        language = torch.zeros(())
        for sample, (tokens, labels) in enumerate(samples_of(lmm, batch)):
            prefixes = {}
            for n, found in all_of.items():
                keys, added = (
                    torch.zeros(found["component_keys"].shape[1:]),
                    torch.zeros(found["component_keys"].shape[1:]),
                )
                for m in range(len(found["match"])):
                    seen = asked[sample] * found["attention"][m]
                    alpha = (seen @ found["match"][m]) / (seen.norm() * found["match"][m].norm())
                    keys, added = (
                        keys + alpha * found["component_keys"][m],
                        added + alpha * found["component_values"][m],
                    )
                prefixes[n] = [prefix_reference.Part(keys, added)]
            language = language + nll(lmm, prefix_reference.hidden_of(lmm, tokens, prefixes), labels)
        return language / batch.counts()[0] + 0.4 * ortho

    return loss


def test_components_start_orthogonal_to_those_of_earlier_tasks(lmm: LMM) -> None:
    found = trained_by_project(lmm, made(CODA), 2)
    for n in (0, 2):
        for ends in (("match",), ("attention",), ("component_keys", "component_values")):
            first, second = (
                torch.cat([values[f"prefix.{n}.{end}"].flatten(1) for end in ends], dim=1)
                for values in (found.values[0], found.starts[1])
            )
            torch.testing.assert_close(second @ second.T, torch.eye(2), atol=1e-4, rtol=0)
            assert float((second @ first.T).abs().max()) < 1e-4
    name = "prefix.0.match"
    assert torch.equal(found.pool.tensors[name][0], found.values[0][name])
    assert not torch.equal(found.values[1][name], found.starts[1][name])


@pytest.mark.parametrize(
    ("fields", "loss", "frozen"),
    [
        (L2P, l2p_loss, ""),
        (CODA, coda_loss, ""),
        (DUAL, dual_loss, ""),
        ({**DUAL, "freeze_g_after_first": True}, dual_loss, "shared."),
    ],
    ids=["l2p", "coda", "dualprompt", "dualprompt with G frozen"],
)
def test_two_stages_are_those_of_the_formulas(lmm: LMM, fields: dict[str, Any], loss: Any, frozen: str) -> None:
    method = made(fields)
    found = trained_by_project(lmm, method)
    expected = trained_by_formulas(lmm, method, loss(lmm), found.starts, frozen)
    assert_same(found, expected)
    recomputed = trained_by_project(lmm, method, policy="full")
    assert_same(recomputed, found)
    shared = [name for name in found.values[0] if name.startswith("shared.")]
    for name in shared:
        assert torch.equal(found.values[1][name], found.values[0][name]) is bool(frozen)
        assert torch.equal(found.pool.shared[name], found.values[1][name])
    assert not any(name.startswith("task_key") for name in found.pool.tensors)


@torch.no_grad()
def logits_of_first_task(lmm: LMM, method: Method, pool: PromptPool) -> Tensor:
    """Of its samples, with the module of the first task, or of the newest where the rule gives that."""
    entry, (samples, keys) = entry_of(method), make_samples(SAMPLES, seed=0, text_only=(1,))
    newest = 0 if method.changes_earlier != "modules" or method.router is not None else len(pool) - 1
    examples = Examples(StageData([(samples, keys, None)]), lmm.conversation)
    chosen = range(len(pool)) if method.rule == "all" else [newest]
    batch = collate_prompts(examples, range(SAMPLES), Selection.same(SAMPLES, list(chosen)))
    tensors = {**pool.tensors, **pool.common}
    seen = embed_with_rows(lmm, batch, entry.rows(tensors, batch), entry.insertion or "after_bos")
    with entry.attached(lmm, tensors, entry.chosen(tensors, batch), seen.inserted):
        hidden = lmm.hidden(seen.vectors, seen.attention, seen.places, batch.images)
    return lmm.logits(hidden[:, -1])


@pytest.mark.parametrize(
    "fields",
    [L2P, CODA, DUAL, {**DUAL, "freeze_g_after_first": True}, {**DUAL, "general_layers": []}, MODULAR, PREFIX],
)
def test_the_second_stage_changes_the_first_tasks_answers_as_the_method_says(lmm: LMM, fields: dict[str, Any]) -> None:
    method = made(fields)
    one, two = trained_by_project(lmm, method, 1).pool, trained_by_project(lmm, method, 2).pool
    before, after = (logits_of_first_task(lmm, method, pool) for pool in (one, two))
    assert torch.equal(before, after) is (method.changes_earlier == "nothing")


def answers(lmm: LMM, method: Method, pool: PromptPool, together: int) -> dict[int, str]:
    samples, keys = make_samples(7, seed=5, text_only=(1, 4))
    examples = Examples(StageData([(samples, keys, None)]), lmm.conversation)
    routing = method.routing
    selection = routing.inference(routing.scores(keys, pool.states), 0, keys.has_image)
    modules = Modules(pool.tensors, selection, entry_of(method), pool.common)
    return generate_answers(lmm, examples, range(7), modules, Decoding(5, together))


@pytest.mark.parametrize("fields", [L2P, CODA, DUAL], ids=["l2p", "coda", "dualprompt"])
def test_answers_do_not_depend_on_the_batch(lmm: LMM, fields: dict[str, Any]) -> None:
    method = made(fields)
    pool = trained_by_project(lmm, method, 3).pool
    expected = answers(lmm, method, pool, 1)
    assert len(set(expected.values())) > 1
    assert all(answers(lmm, method, pool, together) == expected for together in (2, 7))


def test_a_vote_of_the_batch_gives_all_its_samples_the_same_prompts(lmm: LMM) -> None:
    method = made(L2P, batch_vote=True)
    part = learner_of(lmm, method, KEY_WIDTH)["module"]
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.0, 0.8, 0.1], [0.0, 0.1, 0.9, 0.8]])
    assert part.choosing(similarity).tolist() == [[0, 2]] * 3
    own = learner_of(lmm, made(L2P), KEY_WIDTH)["module"].choosing(similarity)
    assert own.tolist() == [[0, 1], [0, 2], [2, 3]]


def test_the_learned_keys_recognise_the_task(lmm: LMM) -> None:
    method = made(DUAL)
    pool = trained_by_project(lmm, method, 2).pool
    _, keys = make_samples(SAMPLES, seed=0, text_only=(1,))
    scores = method.routing.scores(keys, pool.states)
    batch = stage_batch(lmm, method, PromptPool(), 0)
    stacked = torch.stack([state["key"] for state in pool.states])
    expected = queries(batch) @ (stacked / stacked.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("count", "general", "task"),
    [(12, [0, 1], [2, 3, 4]), (32, list(range(6)), list(range(6, 13))), (4, [0], [1]), (2, [0], [1]), (1, [0], [0])],
)
def test_layers_that_are_not_named_are_the_papers_in_proportion(
    count: int, general: list[int], task: list[int]
) -> None:
    assert DualOptions().layers(count) == (general, task)


def test_lengths_are_those_of_the_named_port_unless_they_are_given() -> None:
    assert DualOptions().lengths == (5, 5) and DualOptions(preset="coda").lengths == (6, 20)
    assert DualOptions(preset="coda", general_length=1).lengths == (1, 20)


def test_what_does_not_fit_is_refused(lmm: LMM) -> None:
    with pytest.raises(UserError, match=r"task_layers names layer 7; the decoder has 3 layers, 0 to 2"):
        learner_of(lmm, made(DUAL, task_layers=[7]), KEY_WIDTH)
    with pytest.raises(UserError, match=r"chosen 9 of a pool of 4; expected at most pool_size"):
        learner_of(lmm, made(L2P, chosen=9), KEY_WIDTH)
    with pytest.raises(UserError, match=r"the method task_lora has no key that its router could be learned from"):
        learner_of(lmm, made({"name": "task_lora", "router": "key"}), KEY_WIDTH)
