"""Ranks that are processes of their own load a model by its id: one process of each node asks the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.ranks.environment import free_port
from tests import tiny
from tests.hub_stub import REPOSITORY, Stub, hub_of
from tests.processes import PROJECT

pytestmark = pytest.mark.slow

RANK = f"""
import hashlib, json, os
from dataclasses import replace
from pathlib import Path
from pipeline.hub import snapshots
from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig
from pipeline.ranks.world import close_world, init_world
from pipeline.hub.snapshots import Source, checkpoint, share

tell = snapshots.broadcast_object
if os.environ["SEES_RANK_0"] == "False":  # this machine has one file system: the path is told as one that is not here
    snapshots.broadcast_object = lambda mine: replace(tell(mine), folder=Path("/disk-of-another-node"))
world = init_world()
share(world, [Source("{REPOSITORY}")])
lmm = load_lmm(ModelConfig(path="{REPOSITORY}"))
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in lmm.parameters())
folder = checkpoint(Source("{REPOSITORY}")).folder
close_world()
print(json.dumps({{"folder": str(folder), "weights": hashlib.sha256(weights).hexdigest()}}))
"""


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its number on its node, its working folder, its HF_HOME, and whether it sees rank 0's."""

    local: int
    folder: Path
    home: str
    sees_rank_0: bool = True


def start(stub: Stub, places: list[Place]) -> list[dict[str, str]]:
    """What each rank loaded: the folder and the digest of the weights."""
    port = str(free_port())
    proxies = {"http_proxy", "all_proxy", "https_proxy", "hf_hub_cache", "transformers_offline"}
    inherited = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    processes = []
    for rank, place in enumerate(places):
        environment = {
            **inherited,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(place.local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(PROJECT),
            "HF_ENDPOINT": stub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": place.home,
            "HF_HUB_USER_AGENT_ORIGIN": f"rank-{rank}",
            "SEES_RANK_0": str(place.sees_rank_0),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                cwd=place.folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), [error[-2000:] for _, error in ended]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("repository"))


def fetches(stub: Stub) -> int:
    return sum(asked.startswith("GET") and asked.endswith("/model.safetensors") for asked in stub.asked)


def test_ranks_of_one_node_load_what_rank_0_fetched(llava: Path, tmp_path: Path) -> None:
    places = [Place(local, tmp_path, str(tmp_path / "home")) for local in range(2)]
    with hub_of(llava) as stub:
        cold = start(stub, places)
        assert set(stub.askers) == {"rank-0"}
        assert fetches(stub) == 1
        warm = start(stub, places)
        assert set(stub.askers) == {"rank-0"}
        assert fetches(stub) == 1
    assert cold == warm
    assert cold[0] == cold[1]
    assert Path(cold[0]["folder"]).is_relative_to(tmp_path / "home")


def test_one_process_of_a_node_that_does_not_see_rank_0s_cache_asks_the_hub(llava: Path, tmp_path: Path) -> None:
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        node.mkdir()
    places = [
        Place(0, nodes[0], str(nodes[0] / "home")),
        Place(0, nodes[1], str(nodes[1] / "home"), sees_rank_0=False),
        Place(1, nodes[1], str(nodes[1] / "home"), sees_rank_0=False),
    ]
    with hub_of(llava) as stub:
        told = start(stub, places)
        assert set(stub.askers) == {"rank-0", "rank-1"}
        assert fetches(stub) == 2
        assert start(stub, places) == told
        assert set(stub.askers) == {"rank-0", "rank-1"}
        assert fetches(stub) == 2
    assert len({rank["weights"] for rank in told}) == 1
    for rank, node in zip(told, (nodes[0], nodes[1], nodes[1]), strict=True):
        assert Path(rank["folder"]).is_relative_to(node)


def test_a_node_that_sees_rank_0s_cache_uses_it_whatever_its_own_is(llava: Path, tmp_path: Path) -> None:
    places = [Place(0, tmp_path, str(tmp_path / home)) for home in ("first", "second")]
    with hub_of(llava) as stub:
        told = start(stub, places)
        assert set(stub.askers) == {"rank-0"}
    assert told[0] == told[1]
