"""Secondary shards keep frozen weights inside a node: bytes between two nodes, counted at the wire that joins them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.processes import PROJECT

pytestmark = pytest.mark.slurm

MODEL, WIDTH = PROJECT / "data_prep" / "nano" / "checkpoints" / "llava", 192
NODES, RANKS_PER_NODE, STEPS = 2, 2, 5
LIMIT_S = 600


@pytest.fixture
def nodes() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a virtual cable; for each, how to start a command in it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2; `make test-slurm` installs what is missing")
    names = [f"node{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            ["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]],
            check=True,
        )
        for number, name in enumerate(names, start=1):
            for command in (
                f"address add 10.99.0.{number}/24 dev cable",
                "link set lo up",
                "link set cable up",
            ):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def train(nodes: list[list[str]], folder: Path, configs: dict[str, str]) -> dict[str, Any]:
    """Train on all ranks of all nodes and return what rank 0 measured."""
    job = {"model": str(MODEL), "out": str(folder), "width": WIDTH, "steps": STEPS, "configs": configs}
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    size = NODES * RANKS_PER_NODE
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % RANKS_PER_NODE}
        here = {"LOCAL_WORLD_SIZE": RANKS_PER_NODE, "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": 17700}
        env = {**os.environ, **{name: str(value) for name, value in {**place, **here}.items()}}
        env |= {"GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        command = [*nodes[rank // RANKS_PER_NODE], sys.executable, "-m", "tests.slurm.node_traffic"]
        log = (folder / f"rank-{rank}.log").open("w")
        ranks.append(
            subprocess.Popen([*command, str(folder / "job.json")], cwd=PROJECT, env=env, stdout=log, stderr=log)
        )
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(LIMIT_S) == 0, (folder / f"rank-{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return json.loads((folder / "result.json").read_text("utf-8"))


def test_frozen_weights_stay_inside_their_node(
    nodes: list[list[str]], tmp_path: Path, note: Callable[[str], None]
) -> None:
    shipped = PROJECT / "ds_configs" / "zero3_multinode.json"
    content = json.loads(shipped.read_text("utf-8"))
    del content["zero_optimization"]["zero_hpz_partition_size"]
    without = tmp_path / "without.json"
    without.write_text(json.dumps(content), "utf-8")
    found = train(nodes, tmp_path, {"without": str(without), "with": str(shipped)})
    weights = found["with"]["weights"]
    steady = {name: median(result["crossed"][2:]) for name, result in found.items()}
    for name, result in found.items():
        first = result["crossed"][0]
        note(f"bytes between two nodes {name} secondary shards: first step {first:,}, later {steady[name]:,.0f}")
    note(f"weights {weights:,} bytes; ratio without : with {steady['without'] / steady['with']:.1f}")
    assert found["with"]["losses"] == found["without"]["losses"]
    assert steady["without"] > weights, "without secondary shards every step moves the weights between the nodes"
    assert steady["with"] < 0.1 * weights
