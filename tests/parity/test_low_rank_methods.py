"""Methods on low-rank updates against a re-computation in plain PyTorch, from their formulas.

The reference is transformers' model with hooks of this file on its linear layers; it calls none of the project's parts,
terms or rules. Two stages of two steps with AdamW, on the same samples and from the same initial values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForImageTextToText

from pipeline.data.collate import Batch, Examples, collate
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.methods import make_method
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.low_rank import LowRank
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage, load_stage
from pipeline.ranks.world import init_world
from pipeline.sequence.engine import lmm_engine
from pipeline.training.engine import Engine
from pipeline.training.normaliser import Normaliser
from tests import tiny
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples, train_once

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA, RATE, SAMPLES = 2, 6.0, 0.02, 4
SCALE = ALPHA / RANK
SIZES = {"targets": TARGETS, "rank": RANK, "alpha": ALPHA}
LOSS, VALUES, LOGITS = 2e-5, 2e-4, 1e-4

Values = dict[str, Tensor]  # by "layer.end"
Delta = Callable[[str, Values, Tensor], Tensor]  # (layer, trainables, inputs) -> what is added to its output


class Plain:
    """transformers' model, whose linear layers get what a formula adds."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        decoder = self.model.model.language_model
        linears = {name: module for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
        self.layers = {name: module for name, module in linears.items() if name.rpartition(".")[2] in TARGETS}

    @contextlib.contextmanager
    def updated(self, added: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        hooks = [
            layer.register_forward_hook(lambda _, given, out, name=name: out + added(name, given[0]))
            for name, layer in self.layers.items()
        ]
        yield
        for hook in hooks:
            hook.remove()

    def logits(self, batch: Batch) -> Tensor:
        """At the tokens before those of the answers [n, V]."""
        found = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention, pixel_values=batch.images["pixel_values"]
        ).logits
        return found[:, :-1][batch.labels[:, 1:] != -100]

    @staticmethod
    def answers(batch: Batch) -> Tensor:
        targets = batch.labels[:, 1:]
        return targets[targets != -100]


def with_values(values: Values, name: str, given: Tensor) -> Tensor:
    return lora(name, values, given)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA."""
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


@pytest.fixture(scope="module")
def plain(llava: Path) -> Plain:
    return Plain(llava)


class Run:
    """Two stages of the project's own training, and their samples and initial values."""

    def __init__(self, llava: Path, folder: Path, method: dict[str, Any]) -> None:
        self.recipe = make_recipe(
            llava,
            method=method,
            train__steps=2,
            train__global_batch=SAMPLES,
            train__lr_prompt=RATE,
            train__clip=None,
            train__deepspeed="ds_configs/zero0.json",
        )
        world = init_world()
        self.engine: Engine = lmm_engine(self.recipe, world, KEY_WIDTH)
        self.lmm, self.pool = self.engine.module.lmm, PromptPool()
        self.starts: list[Values] = []
        self.batches: list[Batch] = []
        self.losses: list[list[float]] = []
        self.stages: list[Values] = []
        self.memory: list[dict[str, Tensor]] = []
        for number in (0, 1):
            samples = make_samples(SAMPLES, seed=number)
            examples = Examples(StageData([(*samples, None)]), self.lmm.conversation)
            self.batches.append(collate(examples, range(SAMPLES), [1.0] * SAMPLES, Selection.none(SAMPLES)))
            learner, previous = self.engine.module.learner, self.pool.newest()
            self.starts.append(short(learner.start(self.lmm, self.recipe.seed, number, previous)))
            place = folder / str(number)
            history, values = train_once(self.engine, self.recipe, world, place, self.pool, samples)
            self.losses.append([progress.loss for progress in history])
            self.stages.append(short(values))
            found = load_stage(place, number, "a")
            assert found is not None
            add_stage(self.pool, f"task {number}", found.tensors)
            self.memory.append(dict(self.pool.memory))

    def pool_memory_of_first(self) -> dict[str, Tensor]:
        """The Fisher information that the first stage left."""
        return {name: value for name, value in self.memory[0].items() if name.startswith("memory.fisher.")}

    def module(self, number: int) -> Values:
        """What the pool holds of a stage."""
        return short({name: value[number] for name, value in self.pool.tensors.items()})


def short(values: dict[str, Tensor]) -> Values:
    """By layer and end, without the part's prefix."""
    return {name.split(".", 1)[1] if "." in name else name: value for name, value in values.items()}


def trained(
    plain: Plain,
    run: Run,
    stage: int,
    delta: Delta,
    penalty: Callable[[Values, Tensor], Tensor] = lambda values, logits: torch.zeros(()),
    learned: Callable[[str], bool] = lambda name: True,
) -> tuple[list[float], Values]:
    """Two steps of AdamW from the run's initial values: the losses before each, and the values after both."""
    start = run.starts[stage]
    values = {name: value.clone().requires_grad_(learned(name)) for name, value in start.items()}
    optimizer = torch.optim.AdamW([v for v in values.values() if v.requires_grad], lr=RATE, weight_decay=0.0)
    losses, batch = [], run.batches[stage]
    for _ in range(2):
        with plain.updated(lambda name, given: delta(name, values, given)):
            logits = plain.logits(batch)
        loss = cross_entropy(logits, plain.answers(batch)) + penalty(values, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in values.items()}


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    return functools.reduce(torch.add, tensors)


def lora(name: str, values: Values, given: Tensor) -> Tensor:
    return SCALE * (values[f"{name}.b"] @ (values[f"{name}.a"] @ given.mT)).mT


def compare(run: Run, stage: int, found: tuple[list[float], Values], names: Callable[[str], bool] = bool) -> None:
    losses, values = found
    assert run.losses[stage] == pytest.approx(losses, rel=LOSS)
    for name, value in values.items():
        if names(name):
            torch.testing.assert_close(run.stages[stage][name], value, atol=VALUES, rtol=VALUES, msg=name)


def said(run: Run, number: int, selection: Selection, tensors: dict[str, Tensor] | None = None) -> Tensor:
    """The project's logits of a stage's batch with modules of the pool."""
    batch, method = run.batches[number], run.recipe.method
    entry = entry_of(make_method(method))
    given = {**run.pool.tensors, **run.pool.common} if tensors is None else tensors
    embeddings = run.lmm.embed(batch.input_ids, batch.images, batch.has_image)
    with torch.no_grad(), entry.attached(run.lmm, given, selection):
        hidden = run.lmm.hidden(embeddings, batch.attention, None, batch.images)
        return run.lmm.logits(hidden[:, :-1][batch.labels[:, 1:] != -100])


def first_task_is_untouched(run: Run) -> None:
    """The first task's logits with its module are, to the bit, what they were before there was a second one."""
    alone = {name: value[:1] for name, value in run.pool.tensors.items()} | run.pool.common
    own = Selection(torch.zeros(SAMPLES, 1, dtype=torch.long))
    assert torch.equal(said(run, 0, own), said(run, 0, own, alone))


def test_lora_goes_on_from_stage_to_stage(llava: Path, tmp_path: Path, plain: Plain) -> None:
    run = Run(llava, tmp_path, {"name": "lora", **SIZES})
    assert all(torch.equal(run.starts[1][name], value) for name, value in run.stages[0].items())
    for stage in (0, 1):
        compare(run, stage, trained(plain, run, stage, lora))


@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS, "embed_tokens"], ["embed_tokens"]])
def test_lora_is_what_peft_learns_from_the_same_values(llava: Path, tmp_path: Path, targets: list[str]) -> None:
    """Losses, gradients and values of Hugging Face PEFT's LoRA, to 1e-6."""
    peft = pytest.importorskip("peft", reason="PEFT is a development dependency: pip install -r requirements-dev.txt")
    run = Run(llava, tmp_path, {"name": "lora", **SIZES, "targets": targets})
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    named = rf".*language_model.*\.({'|'.join(targets)})"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=named)
    wrapped = peft.get_peft_model(model, config).eval()
    parameters = {}
    for name, value in wrapped.named_parameters():
        if value.requires_grad:
            layer, _, end = name.partition("language_model.")[2].partition(".lora_")
            parameters[f"{layer}.{end.removeprefix('embedding_')[0].lower()}"] = value
    assert parameters.keys() == run.starts[0].keys()
    for name, value in parameters.items():
        value.data.copy_(run.starts[0][name])
    learner = Learner({"module": LowRank(run.lmm, targets, RANK, ALPHA)})
    own = {name.removeprefix("low_rank."): value for name, value in learner.trainables().items()}
    for name, value in own.items():
        value.data.copy_(run.starts[0][name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    batch, losses = run.batches[0], list[float]()
    LearnerOnLMM(run.lmm, learner)(batch, Normaliser(*batch.counts()))[0].backward()
    for _ in range(2):
        logits = wrapped(
            input_ids=batch.input_ids, attention_mask=batch.attention, pixel_values=batch.images["pixel_values"]
        ).logits[:, :-1][batch.labels[:, 1:] != -100]
        loss = cross_entropy(logits, Plain.answers(batch))
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            for name, value in parameters.items():
                torch.testing.assert_close(own[name].grad, value.grad, atol=1e-6, rtol=1e-4, msg=name)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert run.losses[0] == pytest.approx(losses, rel=1e-6)
    for name, value in parameters.items():
        # Adam divides by the root of the gradient's square, so rounding of a gradient near zero is seen in full.
        near = (run.stages[0][name] - value.detach()).abs()
        assert float(near.quantile(0.99)) < 1e-6, name


@pytest.mark.parametrize("forward", ["all", "own"])
@pytest.mark.parametrize("normalise", [False, True])
def test_olora_is_trained_beside_earlier_modules_and_apart_from_them(
    llava: Path, tmp_path: Path, plain: Plain, forward: str, normalise: bool
) -> None:
    fields = {"penalty": 0.3, "forward": forward, "normalise": normalise}
    run = Run(llava, tmp_path, {"name": "olora", **SIZES, **fields})
    compare(run, 0, trained(plain, run, 0, lora))
    first = run.module(0)

    def both(name: str, values: Values, given: Tensor) -> Tensor:
        own = lora(name, values, given)
        return own + lora(name, first, given) if forward == "all" else own

    def overlap(values: Values, logits: Tensor) -> Tensor:
        products = [(values[f"{name}.a"] @ first[f"{name}.a"].mT).abs().sum() for name in plain.layers]
        return 0.3 * total(products) / (RANK**2 if normalise else 1)

    compare(run, 1, trained(plain, run, 1, both, overlap))
    with (
        plain.updated(lambda name, given: lora(name, first, given) + lora(name, run.module(1), given)),
        torch.no_grad(),
    ):
        expected = plain.logits(run.batches[0])
    every = Selection.same(SAMPLES, [0, 1])
    torch.testing.assert_close(said(run, 0, every), expected, atol=LOGITS, rtol=LOGITS)
    first_task_is_untouched(run)


def test_lora_merged_is_trained_on_the_model_with_what_was_learned(llava: Path, tmp_path: Path, plain: Plain) -> None:
    run = Run(llava, tmp_path, {"name": "lora_merged", **SIZES})
    first = run.module(0)
    compare(run, 1, trained(plain, run, 1, lambda n, values, given: lora(n, values, given) + lora(n, first, given)))


@pytest.mark.parametrize("mix", ["expert", "factors"])
def test_moelora_mixes_experts_by_token(llava: Path, tmp_path: Path, plain: Plain, mix: str) -> None:
    sizes = {"targets": TARGETS, "rank": 4, "alpha": 12.0, "experts": 2}
    run = Run(llava, tmp_path, {"name": "moelora", "mix": mix, **sizes})

    def experts(name: str, values: Values, given: Tensor) -> Tensor:
        a, b, router = (values[f"{name}.{end}"] for end in ("a", "b", "router"))
        shares = torch.softmax(given @ router.mT, dim=-1)
        if mix == "factors":
            down = torch.einsum("bne,erd->bnrd", shares, a)
            up = torch.einsum("bne,eor->bnor", shares, b)
            return 3.0 * torch.einsum("bnor,bnrd,bnd->bno", up, down, given)
        each = [b[e] @ (a[e] @ given.mT) for e in range(len(a))]
        return 3.0 * total(shares[..., e, None] * one.mT for e, one in enumerate(each))

    for stage in (0, 1):
        compare(run, stage, trained(plain, run, stage, experts))
    assert all(torch.equal(run.starts[1][name], value) for name, value in run.stages[0].items())
    with plain.updated(lambda name, given: experts(name, run.module(1), given)), torch.no_grad():
        expected = plain.logits(run.batches[0])
    torch.testing.assert_close(said(run, 0, Selection.same(SAMPLES, [1])), expected, atol=LOGITS, rtol=LOGITS)


def test_ewc_holds_what_mattered_to_the_first_task(llava: Path, tmp_path: Path, plain: Plain) -> None:
    run = Run(llava, tmp_path, {"name": "ewc", **SIZES, "elasticity": 50.0, "fisher_samples": SAMPLES})
    compare(run, 0, trained(plain, run, 0, lora))
    start, batch = run.starts[1], run.batches[0]
    fisher = {name: torch.zeros_like(value) for name, value in start.items()}
    for sample in range(SAMPLES):
        values = {name: value.clone().requires_grad_() for name, value in start.items()}
        with plain.updated(functools.partial(with_values, values)):
            whole = plain.model(
                input_ids=batch.input_ids, attention_mask=batch.attention, pixel_values=batch.images["pixel_values"]
            ).logits
        answer = batch.labels[sample, 1:] != -100
        unlikely = cross_entropy(whole[sample, :-1][answer], batch.labels[sample, 1:][answer], reduction="sum")
        for name, slope in zip(values, torch.autograd.grad(unlikely, list(values.values())), strict=True):
            fisher[name] += slope.square() / SAMPLES
    held = short({n.removeprefix("memory.fisher."): v for n, v in run.pool_memory_of_first().items()})
    assert held.keys() == fisher.keys()
    for name, value in fisher.items():
        torch.testing.assert_close(held[name], value, atol=1e-5, rtol=1e-3, msg=name)

    def stretched(values: Values, logits: Tensor) -> Tensor:
        return 25.0 * total((fisher[name] * (value - start[name]).square()).sum() for name, value in values.items())

    compare(run, 1, trained(plain, run, 1, lora, stretched))


def test_lwf_follows_what_the_stage_before_says(llava: Path, tmp_path: Path, plain: Plain) -> None:
    run = Run(llava, tmp_path, {"name": "lwf", **SIZES, "distillation": 0.7, "temperature": 3.0})
    compare(run, 0, trained(plain, run, 0, lora))
    with plain.updated(lambda name, given: lora(name, run.starts[1], given)), torch.no_grad():
        then = log_softmax(plain.logits(run.batches[1]) / 3.0, dim=-1)

    def divergence(values: Values, logits: Tensor) -> Tensor:
        now = log_softmax(logits / 3.0, dim=-1)
        return 0.7 * 9.0 * (then.exp() * (then - now)).sum(-1).mean()

    compare(run, 1, trained(plain, run, 1, lora, divergence))


def test_core_moe_trains_cores_in_the_singular_vectors_of_the_first_task(
    llava: Path, tmp_path: Path, plain: Plain
) -> None:
    run = Run(llava, tmp_path, {"name": "core_moe", **SIZES})
    compare(run, 0, trained(plain, run, 0, lora, learned=lambda name: not name.endswith(".c")), lambda n: n[-1] != "c")
    bases = {}
    for name in plain.layers:
        whole = run.stages[0][f"{name}.b"] @ run.stages[0][f"{name}.a"]
        u, strengths, v = torch.linalg.svd(whole, full_matrices=False)
        bases[name] = u[:, :RANK], v[:RANK]
        kept = {end: run.pool.common[f"shared.core.{name}.{end}"] for end in ("u", "v")}
        core = run.module(0)[f"{name}.c"]
        torch.testing.assert_close(core.diag(), strengths[:RANK], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept["u"] @ core @ kept["v"], whole, atol=1e-5, rtol=1e-4)

    def core_of(name: str, values: Values, given: Tensor) -> Tensor:
        u, v = bases[name]
        return SCALE * (u @ (values[f"{name}.c"] @ (v @ given.mT))).mT

    losses, values = trained(plain, run, 1, core_of, learned=lambda name: name.endswith(".c"))
    assert run.losses[1] == pytest.approx(losses, rel=LOSS)
    for name, (u, v) in bases.items():  # a singular vector's sign is anybody's, the product's is not
        kept = {end: run.pool.common[f"shared.core.{name}.{end}"] for end in ("u", "v")}
        found = kept["u"] @ run.module(1)[f"{name}.c"] @ kept["v"]
        torch.testing.assert_close(found, u @ values[f"{name}.c"] @ v, atol=1e-3, rtol=1e-3)
    weights = torch.tensor([[0.3, 0.7]]).repeat(SAMPLES, 1)
    with (
        torch.no_grad(),
        plain.updated(
            lambda name, given: (
                0.3 * core_of(name, signed(run, bases, 0), given) + 0.7 * core_of(name, signed(run, bases, 1), given)
            )
        ),
    ):
        expected = plain.logits(run.batches[0])
    both = Selection(Selection.same(SAMPLES, [0, 1]).numbers, weights)
    torch.testing.assert_close(said(run, 0, both), expected, atol=LOGITS, rtol=LOGITS)
    first_task_is_untouched(run)


def signed(run: Run, bases: dict[str, tuple[Tensor, Tensor]], number: int) -> Values:
    """A stage's cores in the reference's bases, whose signs may differ from the project's."""
    found = {}
    for name, (u, v) in bases.items():
        kept = {end: run.pool.common[f"shared.core.{name}.{end}"] for end in ("u", "v")}
        found[f"{name}.c"] = (u.mT @ kept["u"]) @ run.module(number)[f"{name}.c"] @ (kept["v"] @ v.mT)
    return found


@pytest.mark.parametrize("fuse", ["product", "sum"])
@pytest.mark.parametrize("routed_layers", [0, 1, 2])
def test_hide_fuses_below_the_last_layers_and_routes_in_them(
    llava: Path, tmp_path: Path, plain: Plain, fuse: str, routed_layers: int
) -> None:
    run = Run(llava, tmp_path, {"name": "hide", **SIZES, "fuse": fuse, "routed_layers": routed_layers})
    for stage in (0, 1):
        compare(run, stage, trained(plain, run, stage, lora))
    weights = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0], [0.5, 0.5]])
    modules = [run.module(number) for number in (0, 1)]
    last = max(int(name.split(".")[1]) for name in plain.layers) + 1

    def hidden(name: str, given: Tensor) -> Tensor:
        if int(name.split(".")[1]) >= last - routed_layers:
            return total(weights[:, i, None, None] * lora(name, one, given) for i, one in enumerate(modules))
        if fuse == "sum":
            return total(lora(name, one, given) for one in modules)
        merged = {f"{name}.{end}": total(one[f"{name}.{end}"] for one in modules) for end in ("a", "b")}
        return lora(name, merged, given)

    with plain.updated(hidden), torch.no_grad():
        expected = plain.logits(run.batches[0])
    chosen = Selection(Selection.same(SAMPLES, [0, 1]).numbers, weights)
    torch.testing.assert_close(said(run, 0, chosen), expected, atol=LOGITS, rtol=LOGITS)


def test_disco_adds_modules_by_their_weights_in_every_layer(llava: Path, tmp_path: Path, plain: Plain) -> None:
    run = Run(llava, tmp_path, {"name": "disco", **SIZES})
    for stage in (0, 1):
        compare(run, stage, trained(plain, run, stage, lora))
    _, keys = make_samples(SAMPLES, seed=0)
    routing = make_method(run.recipe.method).routing
    means = [torch.nn.functional.normalize(make_samples(SAMPLES, seed=n)[1].text, dim=-1).sum(0) for n in (0, 1)]
    unit = torch.nn.functional.normalize(keys.text, dim=-1)
    cosines = unit @ torch.stack([mean / mean.norm() for mean in means]).mT
    weights = torch.softmax(cosines / 0.05, dim=-1)
    chosen = routing.inference(routing.scores(keys, run.pool.states), 0, keys.has_image)
    torch.testing.assert_close(chosen.full_weights(), weights)
    with (
        torch.no_grad(),
        plain.updated(
            lambda name, given: total(weights[:, i, None, None] * lora(name, run.module(i), given) for i in (0, 1))
        ),
    ):
        expected = plain.logits(run.batches[0])
    torch.testing.assert_close(said(run, 0, chosen), expected, atol=LOGITS, rtol=LOGITS)
    first_task_is_untouched(run)
