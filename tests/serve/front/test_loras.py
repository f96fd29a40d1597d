"""Low-rank updates that an engine has loaded: PEFT's folders, and requests that name the one that routing chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient

from pipeline.adapter.answering import Question
from pipeline.adapter.choosing import Chooser
from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.load import load_adapter
from pipeline.adapter.vocabulary.export import ROUTER, export_checkpoint
from pipeline.adapter.vocabulary.lora import CONFIG, LORAS, WEIGHTS
from pipeline.adapter.vocabulary.part import PLACEHOLDER
from pipeline.backbones.lmm import load_lmm
from pipeline.cli.commands import app
from pipeline.config.method import method_options
from pipeline.errors import EXIT_USER
from pipeline.prompts.pool import PromptPool
from pipeline.serve.front.engine import Behind, Engine
from pipeline.serve.front.front import Front
from pipeline.serve.front.process import vllm_process
from pipeline.serve.front.sets import Folder
from pipeline.serve.options import EngineOptions
from pipeline.serve.web import Settings
from tests.adapters import Asks, Models, question, save_adapter, save_models
from tests.serve.front.conftest import Asked
from tests.serve.front.fake_engine import FakeEngine
from tests.serve.test_openai_client import messages

TARGETS = ("q_proj", "down_proj")
RANK, ALPHA = 4, 8.0


def save_lora_adapter(
    folder: Path, models: Models, numbers: tuple[int, ...] = (0, 1, 2), asks: Asks = question, **method: Any
) -> Path:
    """An adapter of task_lora with random updates, whose tasks' questions find their own."""
    found = read_adapter(save_adapter(folder, models, numbers, asks, router="mean"))
    options = method_options(
        **{"name": "task_lora", "targets": list(TARGETS), "rank": RANK, "alpha": ALPHA, "router": "mean", **method}
    )
    lmm = load_lmm(found.meta.model)
    layers = {name: layer for name, layer in lmm.linears.items() if name.endswith(TARGETS)}
    pool = PromptPool()
    for number, name in enumerate(found.pool.names):
        generator = torch.Generator().manual_seed(number)
        tensors = dict[str, torch.Tensor]()
        for layer, linear in layers.items():
            a, b = torch.randn(RANK, linear.in_features), torch.randn(linear.out_features, RANK)
            a, b = (value.normal_(generator=generator) for value in (a, b))
            tensors |= {f"low_rank.{layer}.a": a * 0.5, f"low_rank.{layer}.b": b * 0.5}
        pool.append(name, tensors, found.pool.states[number])
    write_adapter(Adapter(found.meta.model_copy(update={"method": options}), pool), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    return save_lora_adapter(folder / "adapter", save_models(folder))


@pytest.fixture(scope="module")
def checkpoint(adapter: Path) -> Path:
    export_checkpoint(adapter, adapter.with_name("checkpoint"), "lora")
    return adapter.with_name("checkpoint")


def test_peft_computes_what_the_run_does(adapter: Path, checkpoint: Path) -> None:
    """PEFT is not installed: its formula, W x + alpha / r B A x, on the layers that its names say."""
    from tests.adapter.vocabulary import inputs_of, loaded

    names = json.loads((checkpoint / ROUTER).read_text())["loras"]
    run, asked = load_adapter(adapter), Question("what is it?")
    for number, served in enumerate(names.values()):
        folder = checkpoint / LORAS / served
        settings = json.loads((folder / CONFIG).read_text())
        assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (RANK, ALPHA, sorted(TARGETS))
        model, processor = loaded(checkpoint)
        tensors = load_file(folder / WEIGHTS)
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            with torch.no_grad():
                layer.weight += ALPHA / RANK * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        inputs = inputs_of(processor, asked, [])
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        text = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        pool = run.pool.picked([number])
        alone = type(run)(run.source.__class__(**{**vars(run.source), "pool": pool, "tasks": pool.names}))
        assert alone.answer([asked])[0].text == text


def test_a_request_names_the_update_that_routing_chose(adapter: Path, checkpoint: Path) -> None:
    names = json.loads((checkpoint / ROUTER).read_text())["loras"]
    folder = Folder(adapter, "lora")
    sets, fake = folder.read(), FakeEngine(checkpoint)
    sets.require_export(checkpoint)
    fake.loras = set(names.values())
    fake.up()
    engine = Engine(Behind(fake.url, sets.form))
    front = Front(sets, Chooser(sets.source, "cpu"), engine, Settings("m"), 16, folder.read)
    try:
        with TestClient(front.app(), base_url="http://localhost") as client:
            asked = Asked(front, client)
            for number in range(3):
                reply = asked.post(messages=messages(question(number)))
                assert reply.status_code == 200, reply.text
                assert reply.json()["model"] == "m" and reply.json()["prompt_sets"]["selected"] == [f"T{number}"]
                assert fake.questions()[-1]["model"] == names[f"T{number}"]
            assert asked.post(messages=[{"role": "user", "content": f"what is {PLACEHOLDER}?"}]).status_code == 200
            assert PLACEHOLDER not in json.dumps(fake.questions()[-1])
            fake.loras = {"T0-00000000"}
            front.engine.lost(ValueError("restarted"))
            reply = asked.post(messages=messages(question(0)))
            assert reply.status_code == 503 and "lacks what was learned" in reply.json()["error"]["message"]
            assert client.post("/reload", json={}).status_code == 409
    finally:
        fake.down()


def test_vllm_is_started_with_every_update(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serve.front.process.vllm_command", lambda program: ["vllm", "serve"])
    command = " ".join(vllm_process(checkpoint, EngineOptions(form="lora"), "m", "float32", 4).command)
    assert "--enable-lora --max-lora-rank 8 --max-loras 3 --lora-modules T0-" in command
    assert str(checkpoint / LORAS / "T2-") in command


def test_several_updates_at_once_are_refused(adapter: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    read = read_adapter(adapter)
    options = method_options(name="task_lora", router="mean", rule="soft")
    write_adapter(Adapter(read.meta.model_copy(update={"method": options}), read.pool), tmp_path / "soft")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "soft"), str(tmp_path / "out"), "--as", "lora"])
    said = " ".join(done.stderr.split())
    assert done.exit_code == EXIT_USER and "answers with several updates at once, and a request names one" in said


def test_prompt_sets_are_no_updates(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    plain = save_adapter(tmp_path / "plain", save_models(tmp_path))
    done = CliRunner().invoke(app, ["export", str(plain), str(tmp_path / "out"), "--as", "lora"])
    said = " ".join(done.stderr.split())
    assert done.exit_code == EXIT_USER and "the part input_rows (method modalprompt); expected low-rank updates" in said
