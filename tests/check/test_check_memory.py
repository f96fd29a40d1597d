"""The memory plan against what is really allocated."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.backbones.families.base import LMMFamily
from pipeline.backbones.gated import gates_kept_once
from pipeline.planning.memory_plan import ModelShape, plan_memory, training_activations
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import Tokens
from pipeline.planning.workload import Workload
from tests import tiny
from tests.backbones.flash_on_cpu import use_flash_on_cpu
from tests.processes import torchrun
from tests.training.worlds import KEY_WIDTH, make_recipe

LIMIT_S = 240
TOKENS = Tokens(image=16, text=20, answer=4, source="given")
TOLERANCE = 0.05
STAGES = {f"zero{stage}": {"train__deepspeed": f"ds_configs/zero{stage}.json"} for stage in (0, 2, 3)}
LOW = {f"{name}, bf16": {**changes, "model__dtype": "bfloat16"} for name, changes in STAGES.items()}
TWO = {
    "zero2, bf16": LOW["zero2, bf16"],
    "zero2, bf16, nf4": {**LOW["zero2, bf16"], "model__quantization": "nf4"},
    "zero2, int8": {**STAGES["zero2"], "model__quantization": "int8"},
    "zero3": STAGES["zero3"],
    "zero3, bf16": LOW["zero3, bf16"],
    "zero3, projector": {**STAGES["zero3"], "train__projector": "trained"},
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


def held(folder: Path, model: Path, ranks: int, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Bytes that rank 0 of so many holds after a step, for every entry of `runs` (recipe changes)."""
    (folder / "job.json").write_text(json.dumps({"model": str(model), "out": str(folder), "runs": runs}))
    torchrun([str(Path(__file__).with_name("held.py")), str(folder / "job.json")], ranks, LIMIT_S)
    return json.loads((folder / "held.json").read_text())


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("ranks", "runs"),
    [pytest.param(1, {**STAGES, **LOW}, marks=pytest.mark.slow), (2, TWO)],
    ids=["one rank", "two ranks"],
)
def test_weights_trainables_and_optimizer_are_what_a_run_allocates(
    llava: Path, tmp_path: Path, ranks: int, runs: dict[str, dict[str, Any]]
) -> None:
    found = held(tmp_path, llava, ranks, runs)
    for name, changes in runs.items():
        recipe = make_recipe(llava, **changes)
        plan = plan_memory(Workload.of(recipe, KEY_WIDTH), ranks, meta_model(recipe.model), TOKENS)
        for part, size in found[name].items():
            planned = plan.bytes_of(part)
            assert abs(planned - size) <= TOLERANCE * size, f"{ranks} ranks, {name}: {part} {planned}, held {size}"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key_value_heads", [8, 2])
def test_activations_are_what_the_decoder_keeps_for_its_backward_pass(
    attention: str, dtype: torch.dtype, key_value_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaModel

    # DeepSpeed's ZeRO-3 leaves a linear of its own behind in the process, which keeps less.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)

    layers, batch, length = 3, 2, 150
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=key_value_heads,
    )
    use_flash_on_cpu(None, monkeypatch)
    model = LlamaModel._from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.config._attn_implementation = attention
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    prompts = torch.randn(batch, length, 128, dtype=dtype, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -20:] = 0
    frozen: Any = SimpleNamespace(decoder=model, family=LMMFamily)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), gates_kept_once(frozen):
        hidden = model(inputs_embeds=prompts, attention_mask=mask, use_cache=False).last_hidden_state
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert hidden.requires_grad

    recipe = make_recipe("none", model__attn_implementation=attention)
    shape = ModelShape([], [], 0, [], config, None, gates_kept_once=True)
    tokens = Tokens(image=0, text=length, answer=0, source="")
    planned = training_activations(Workload.of(recipe, KEY_WIDTH), shape, batch, length, tokens, dtype.itemsize)
    # The plan has one layer more, that of the backward pass at work.
    final_norm = 4 * batch * length * 128
    planned = (planned - final_norm) * layers // (layers + 1) + final_norm
    assert abs(planned - size) <= TOLERANCE * size


def test_ranks_share_the_weights_only_under_zero_3(llava: Path) -> None:
    def weights(stage: int, ranks: int) -> int:
        recipe = make_recipe(llava, train__deepspeed=f"ds_configs/zero{stage}.json", train__global_batch=8)
        return plan_memory(Workload.of(recipe, KEY_WIDTH), ranks, meta_model(recipe.model), TOKENS).bytes_of("weights")

    assert weights(2, 8) == weights(2, 1)
    assert weights(3, 8) < weights(3, 1) / 7
    assert weights(3, 1) == weights(2, 1)


def test_generating_needs_a_whole_model_only_under_zero_3(llava: Path) -> None:
    def replica(stage: int) -> int:
        recipe = make_recipe(llava, train__deepspeed=f"ds_configs/zero{stage}.json")
        entries = plan_memory(Workload.of(recipe, KEY_WIDTH), 1, meta_model(recipe.model), TOKENS).entries
        return next(entry.evaluation for entry in entries if entry.name == "evaluation replica")

    assert replica(2) == 0
    assert replica(3) > 200_000  # 61 k parameters in float32


def test_the_window_is_the_largest_layer_what_is_reused_soon_and_what_is_prefetched(
    llava: Path, tmp_path: Path
) -> None:
    def window(**settings: int) -> int:
        file = tmp_path / "zero3.json"
        stage3 = {f"stage3_{name}": value for name, value in settings.items()}
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, **stage3}}))
        recipe = make_recipe(llava, train__deepspeed=str(file))
        return plan_memory(Workload.of(recipe, KEY_WIDTH), 1, meta_model(recipe.model), TOKENS).bytes_of(
            "gathered window"
        )

    none = {"param_persistence_threshold": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0}
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32  # attention, MLP and norms of a decoder layer
    trained = 4 * 32 + (32 * 32 + 32) + (32 * KEY_WIDTH + KEY_WIDTH)
    largest = 260 * 32  # the word embedding
    assert window(**none) == 4 * (layer + trained)
    assert window(**{**none, "max_reuse_distance": 2000}) == 4 * (layer + trained + 2000)
    assert window(**{**none, "prefetch_bucket_size": 100}) == 4 * (2 * layer + trained + 100 + largest)
    limited = {**none, "prefetch_bucket_size": 1000, "max_live_parameters": layer + trained + 10}
    assert window(**limited) == 4 * (layer + trained + 10 + largest)
    assert window(**{**none, "param_persistence_threshold": 10**6}) == 0
