"""The method against recorded numbers (`--fixtures DIR`, folder modalprompt/), and against a folder of other sizes.

Everything goes through the pipeline's own classes, once with the default method and once with that of the compat
recipe: where the official code is not broken the two are the same method.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.load import load_recipe
from pipeline.config.method import MethodOptions, method_options
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, collate
from pipeline.methods import Method, make_method
from pipeline.prompts.generation import Decoding, generate_answers, prompt_sets
from pipeline.prompts.learner import prompt_learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers.mean import similarities
from pipeline.training.normaliser import Normaliser
from tests.parity import reference
from tests.parity.recorded import Recorded
from tests.processes import torchrun

LIMIT_S = 400
# Of a float32 re-implementation: losses, gradients (relative to the largest entry), logits, three optimizer steps.
LOSS, GRADIENT, LOGITS, STEPS = 2e-6, 1e-6, 1e-5, 1e-6
RANKS = 1e-5


@pytest.fixture(scope="module", params=["recorded", "other sizes"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    if request.param == "other sizes":
        return Recorded(reference.record(tmp_path_factory.mktemp("reference")))
    root = request.config.getoption("--fixtures")
    if not root or not (Path(root) / "modalprompt").is_dir():
        pytest.skip("no recorded results: give --fixtures DIR with a folder modalprompt/")
    return Recorded(Path(root).resolve() / "modalprompt")


@pytest.fixture(scope="module")
def model(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.save_model(tmp_path_factory.mktemp("models") / "llava")


MODES = ("default", "compat")


def method_of(mode: str, recorded: Recorded) -> MethodOptions:
    chosen = method_options(router="prototype") if mode == "default" else load_recipe("coin_llava15_7b_compat").method
    return chosen.model_copy(update={"prompt_length": recorded.prompt_length, "k": recorded.k})


@pytest.fixture(scope="module", params=MODES)
def config(request: pytest.FixtureRequest, recorded: Recorded) -> MethodOptions:
    return method_of(request.param, recorded)


@pytest.fixture(scope="module")
def method(config: MethodOptions) -> Method:
    return make_method(config)


@pytest.fixture(scope="module")
def module(recorded: Recorded, model: Path, config: MethodOptions) -> LearnerOnLMM:
    lmm = load_lmm(ModelConfig(path=str(model)))
    return LearnerOnLMM(
        lmm, prompt_learner(lmm, recorded.prompt_length, recorded.key_width, make_method(config).insertion)
    )


@pytest.fixture(scope="module")
def examples(recorded: Recorded, module: LearnerOnLMM) -> Examples:
    vision = module.lmm.model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    return recorded.examples(module.lmm.processor, module.lmm.image_token, tokens)


def start(
    module: LearnerOnLMM, method: Method, recorded: Recorded, examples: Examples, task: int
) -> tuple[PromptPool, Batch]:
    """Set up training of `task` (1-based); the pool of earlier sets and the recorded batch with our selection."""
    pool = recorded.pool(recorded.train[task], task - 1)
    selected = method.routing.training(examples.data.keys, pool.states)
    values = recorded.start(task)
    module.learner["module"].prompt.data.copy_(values.pop("prompt"))
    module.learner["head"].load_state_dict({name.removeprefix("head."): value for name, value in values.items()})
    module.learner.start_stage(pool.tensors)
    module.learner.terms[0].weight = method.prototype_weight
    return pool, collate(examples, range(recorded.samples), [1.0] * recorded.samples, selected)


def step(module: LearnerOnLMM, batch: Batch) -> Tensor:
    module.zero_grad()
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    return torch.stack([*terms.values()])


def assert_gradient(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert (found - expected).abs().max() <= GRADIENT * expected.abs().max() + 1e-12


def test_sets_are_selected_and_ordered_as_recorded(recorded: Recorded, method: Method, examples: Examples) -> None:
    keys = examples.data.keys
    for task, case in recorded.train.items():
        pool = recorded.pool(case, task - 1)
        found = method.routing.training(keys, pool.states).numbers
        if "similarity_previous" in case:
            scores = similarities(keys, pool.prototypes, method.options.image_weight)
            torch.testing.assert_close(scores, case["similarity_previous"], atol=LOSS, rtol=0)
        if "top_previous" in case:
            assert torch.equal(found, case["top_previous"].flip(1))
        else:
            assert found.tolist() == [list(range(task - 1))] * recorded.samples
    sets = next(iter(recorded.train.values()))
    for tasks, case in recorded.infer.items():
        pool = recorded.pool(sets, tasks)
        scores = similarities(keys, pool.prototypes, method.options.image_weight)
        torch.testing.assert_close(scores, case["similarity"], atol=LOSS, rtol=0)
        assert torch.equal(method.routing.inference(scores, 0, keys.has_image).numbers, case["top"].flip(1))


def test_losses_and_gradients(recorded: Recorded, module: LearnerOnLMM, method: Method, examples: Examples) -> None:
    for task, case in recorded.train.items():
        terms = step(module, start(module, method, recorded, examples, task)[1])
        expected = torch.stack([case[f"loss_{name}"].reshape(()) for name in ("lm", "image", "text")])
        torch.testing.assert_close(terms, expected, atol=LOSS, rtol=0)
        assert_gradient(module.learner["module"].prompt.grad, case["grad.prompt"])
        for name, parameter in module.learner["head"].named_parameters():
            assert_gradient(parameter.grad, case[f"grad.head.{name}"])


def test_answer_logits(
    recorded: Recorded, module: LearnerOnLMM, method: Method, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_logits(monkeypatch)
    for task, case in recorded.train.items():
        _, batch = start(module, method, recorded, examples, task)
        seen.clear()
        with torch.no_grad():
            module(batch, Normaliser(1.0, 1.0))
        expected = torch.cat([case[f"answer_logits.{number}"] for number in range(recorded.samples)])
        torch.testing.assert_close(torch.cat(seen), expected, atol=LOGITS, rtol=0)


def watch_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    original = LMM.logits

    def watched(self: LMM, hidden: Tensor) -> Tensor:
        seen.append(original(self, hidden))
        return seen[-1]

    monkeypatch.setattr(LMM, "logits", watched)
    return seen


def test_three_optimizer_steps(recorded: Recorded, module: LearnerOnLMM, method: Method, examples: Examples) -> None:
    for task, case in recorded.train.items():
        losses, prompt = optimizer_steps(module, method, recorded, examples, task)
        torch.testing.assert_close(losses, case["trajectory"], atol=LOSS, rtol=1e-6)
        worst = ((prompt - case["prompt_after"]).abs() / undetermined(case, recorded.meta["lr"])).max()
        assert worst <= 1, f"task {task}: the prompt set is off by {worst:.2f} times what float32 leaves undetermined"


def undetermined(case: dict[str, Tensor], rate: float) -> Tensor:
    """How far [L, D] two float32 computations of the same steps may be apart.

    Adam divides each entry's gradient by its own size, so where that is small beside the largest, the error that a
    gradient may have (GRADIENT of the largest) is as much larger in the entry's steps.
    """
    gradient = case["grad.prompt"].abs()
    share = GRADIENT * gradient.max() / gradient.clamp(min=1e-30)
    return STEPS + len(case["trajectory"]) * rate * share.clamp(max=2.0)


def optimizer_steps(
    module: LearnerOnLMM, method: Method, recorded: Recorded, examples: Examples, task: int
) -> tuple[Tensor, Tensor]:
    """Losses of as many steps as were recorded, in this process, and the prompt set after them."""
    _, batch = start(module, method, recorded, examples, task)
    trainables = list(module.learner.trainables().values())
    optimizer = torch.optim.AdamW(trainables, lr=recorded.meta["lr"], weight_decay=0.0)
    losses = []
    for _ in range(len(recorded.train[task]["trajectory"])):
        losses.append(step(module, batch))
        optimizer.step()
    return torch.stack(losses), module.learner["module"].prompt.detach().clone()


def test_greedy_answers_and_their_first_logits(
    recorded: Recorded, module: LearnerOnLMM, method: Method, examples: Examples
) -> None:
    sets = next(iter(recorded.train.values()))
    first: list[Tensor] = []
    handle = module.lmm.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: first.append(output.detach()[:, -1].float())
    )
    keys = examples.data.keys
    for tasks, case in recorded.infer.items():
        pool = recorded.pool(sets, tasks)
        scores = similarities(keys, pool.prototypes, method.options.image_weight)
        selected = method.routing.inference(scores, 0, keys.has_image)
        inserted = prompt_sets(pool.prompts, selected, method.insertion)
        new = case["generated"].shape[1]
        for number in range(recorded.samples):
            first.clear()
            alone = generate_answers(module.lmm, examples, [number], inserted, Decoding(new, 1))
            torch.testing.assert_close(first[0][0], case["first_logits"][number], atol=LOGITS, rtol=0)
            check_tokens(module, json.loads(alone[number]), case["generated"][number].tolist())
        decoding = Decoding(new, recorded.samples)
        together = generate_answers(module.lmm, examples, range(recorded.samples), inserted, decoding)
        for number, answer in together.items():
            check_tokens(module, json.loads(answer), case["generated"][number].tolist())
    handle.remove()


def check_tokens(module: LearnerOnLMM, found: list[int], expected: list[int]) -> None:
    """Equal up to the end token; behind it each side may fill up as it likes."""
    end = module.lmm.tokenizer.eos_token_id
    stop = expected.index(end) + 1 if end in expected else len(expected)
    assert found[:stop] == expected[:stop]


@pytest.mark.gloo
def test_two_processes_under_zero3_equal_one_process_and_the_recorded_steps(
    recorded: Recorded, model: Path, tmp_path: Path
) -> None:
    lmm = load_lmm(ModelConfig(path=str(model)))
    module = LearnerOnLMM(lmm, prompt_learner(lmm, recorded.prompt_length, recorded.key_width))
    vision = lmm.model.config.vision_config
    examples = recorded.examples(lmm.processor, lmm.image_token, (vision.image_size // vision.patch_size) ** 2)
    methods = {mode: method_of(mode, recorded) for mode in MODES}
    results = on_ranks(recorded, model, methods, tmp_path, ranks=2)
    for mode, (task, case) in itertools.product(MODES, recorded.train.items()):
        one = optimizer_steps(module, make_method(methods[mode]), recorded, examples, task)
        two = tuple(torch.tensor(results[mode][str(task)][kind]) for kind in ("losses", "prompt"))
        torch.testing.assert_close(two, one, atol=RANKS, rtol=0)
        torch.testing.assert_close(two, (case["trajectory"], case["prompt_after"]), atol=RANKS, rtol=0)


def on_ranks(recorded: Recorded, model: Path, methods: dict[str, MethodOptions], folder: Path, ranks: int) -> Any:
    """The recorded steps of every training case by `pipeline.training.loop` under ZeRO-3 on so many processes."""
    job = {
        "folder": str(recorded.folder),
        "model": str(model),
        "out": str(folder / "result.json"),
        "ranks": ranks,
        "methods": {mode: config.model_dump(mode="json") for mode, config in methods.items()},
    }
    (folder / "job.json").write_text(json.dumps(job))
    torchrun(["-m", "tests.parity.ranks", str(folder / "job.json")], ranks, LIMIT_S)
    return json.loads((folder / "result.json").read_text())
