"""Makes `kept/` with the code as it is: `python -m tests.compat.make artefacts golden [--replace]`.

What is kept is worth keeping because earlier code wrote it. To write it anew is right for `golden`, after a change that
alters numbers on purpose; `artefacts` of today's code would take the place of those that users still have. Nothing that
is there is overwritten without `--replace`; `golden` without it adds the curves that are not there yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"})

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.clip.project import save_model
from tests.compat.curves import (
    CLIP,
    CURVES,
    DPL,
    FURTHER,
    Golden,
    curves_of_benchmark,
    curves_of_dpl,
    curves_of_sequence,
    save_pictures,
)
from tests.compat.inner import CLIP_METHODS, SEQUENCE_METHODS, load_any, logits_of, recipe_names
from tests.compat.kept import KEPT, ORIGIN, TENSORS, program, succeeded, this_platform

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("artefacts", "golden")  # the second is trained on the models and data of the first
CODE = ("pipeline", "data_prep", "ds_configs")
KINDS = ("models", "data", "runs", "finished", "adapters", "registered", "resolved")  # folders of the artefacts
# The stage or unit in which a recipe's run is stopped.
UNFINISHED = {"sequence": "stages/03-T2", "projector": "stages/02-T1", "benchmark": "units/mpl-toys-s2"}
# In the order in which the recipe's tasks are learned: what is asked, the colour of the pictures, the two answers.
TASKS = {
    "T0": ("which colour is in picture {n}?", (220, 30, 30), ("a", "b")),
    "T1": ("count what you see, number {n}.", (30, 200, 40), ("q", "r")),
    "T2": ("read the sign on plate {n}", (40, 60, 230), ("x", "y")),
}
TRAIN, TEST = 10, 5
STOP_AFTER = 5  # steps of the stage or unit that is left unfinished
RESUMABLE = 75
LEFT_OUT = (
    "LOCK",
    "*.lock",
    "report.html",
    "figures",
)  # of a run folder: of this machine only, or drawn anew by `report`


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--replace", action="store_true", help="overwrite what is kept")
    chosen = parser.parse_args()
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE], cwd=REPOSITORY).returncode:
        sys.exit(f"{', '.join(CODE)} have changes that are in no commit; commit them first.")
    parts = [part for part in PARTS if part in chosen.parts]
    origin = json.loads(ORIGIN.read_text("utf-8")) if ORIGIN.is_file() else {}
    for part in parts:
        if part == "artefacts" and part in origin and not chosen.replace:
            sys.exit(
                f"{KEPT} has {part} already, of commit {origin[part]['commit']}; to overwrite them give --replace."
            )
    torch.set_num_threads(1)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True).strip()
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="compat-") as folder:
            os.chdir(folder)
            make_artefacts() if part == "artefacts" else make_golden(commit, chosen.replace)
            os.chdir(REPOSITORY)
        if part in origin and not chosen.replace:
            continue
        origin[part] = {"commit": commit, "platform": this_platform()}
        ORIGIN.write_text(json.dumps(origin, indent=2) + "\n", "utf-8")


def make_artefacts() -> None:
    """Models, prepared data, runs, adapters, a registered model and resolved recipes."""
    shutil.copytree(KEPT / "recipes", "recipes")
    save_models(Path("models"))
    save_pictures(Path("datasets"))
    draw_tasks(Path("coin"), said_by_the_model())
    for name in ("sequence", "benchmark"):
        succeeded("prepare", f"recipes/{name}.yaml")
    Path("resolved").mkdir()
    for recipe in (*map(str, sorted(Path("recipes").glob("*.yaml"))), *recipe_names()):
        load_any(recipe).dump_yaml(Path("resolved") / f"{Path(recipe).stem}.yaml")
    for name, last in UNFINISHED.items():
        leave_unfinished(name, last)
        shutil.copytree(Path("runs") / name, Path("resumed") / name)
        for folder in ("resumed", "unbroken"):
            succeeded("run", f"recipes/{name}.yaml", "--set", f"run_dir={folder}/{name}")
        finished = Path("finished") / name
        finished.mkdir(parents=True)
        for file in (f"{last}/{TENSORS}", "results.json" if name == "benchmark" else "matrix.json"):
            one, other = (Path(folder) / name / file for folder in ("unbroken", "resumed"))
            if one.read_bytes() != other.read_bytes():
                sys.exit(f"{name}: {file} of the resumed run is not that of the unbroken one")
            shutil.copy(one, finished)
        keep_answers(Path("unbroken") / name, finished)
    for name in ("sequence", "projector"):
        succeeded("export", f"unbroken/{name}", f"adapters/{name}", "--licence", "cc0-1.0")
    keep_registered_model()
    without_absolute_paths()
    for name in KINDS:
        shutil.rmtree(KEPT / name, ignore_errors=True)
        shutil.copytree(name, KEPT / name, ignore=shutil.ignore_patterns(*LEFT_OUT))


def keep_answers(run: Path, folder: Path) -> None:
    """What a finished sequence answers, or what its last unit says of some random images."""
    if (run / "eval").is_dir():
        files = sorted(sorted((run / "eval").glob("after-*"))[-1].glob("*.jsonl"))
        lines = [{"task": file.stem, **json.loads(line)} for file in files for line in file.open()]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    said = {
        f"logits.{unit.name}": logits_of(unit, images)
        for unit in sorted((run / "units").glob("*/"))
        if (unit / TENSORS).is_file()
    }
    save_file({"images": images, **said}, folder / "logits.safetensors")


def without_absolute_paths() -> None:
    """Shorten what names folders of this machine: they say nothing elsewhere, and nothing reads them."""
    here = f"{Path.cwd()}/"
    for path in Path("runs").glob("*/run.json"):
        path.write_text(path.read_text("utf-8").replace(here, ""), "utf-8")
    described = Path("registered/MLmodel")
    text = re.sub(r"(uri|model_code_path): /\S*/", r"\1: ", described.read_text("utf-8"))
    described.write_text(text, "utf-8")


def make_golden(commit: str, replace: bool) -> None:
    """Losses and learned values of every method of both halves; those that are kept stay, unless they are replaced."""
    for name in ("models", "data", "recipes"):
        shutil.copytree(KEPT / name, name)
    if replace:
        shutil.rmtree(KEPT / "golden", ignore_errors=True)
    golden = Golden()
    benchmarks = {CLIP: curves_of_benchmark, DPL: curves_of_dpl}
    for name in (*benchmarks, *CURVES, *FURTHER):
        if not golden.names(name):
            golden.add(benchmarks[name]() if name in benchmarks else curves_of_sequence(name), commit)
            print(f"  {name}", flush=True)
    golden.save()
    left = {*SEQUENCE_METHODS, *CLIP_METHODS} - {"zero_shot"} - methods_with_curves()
    if left:
        sys.exit(f"no curve is of the methods {', '.join(sorted(left))}; add them to curves.py or a benchmark's curves")


def methods_with_curves() -> set[str]:
    """The methods that curves are of: those of a sequence by `--set`, of a benchmark by its rows."""
    changed = {**CURVES, **FURTHER}.values()
    told = [changes.get("method", {}).get("name") or changes.get("method.name", "modalprompt") for changes in changed]
    files = [KEPT / "recipes" / f"{name}_curves.yaml" for name in (CLIP, DPL)]
    rows = [row for file in files for row in yaml.safe_load(file.read_text("utf-8"))["methods"]]
    return {*told, *(row.get("method", row["name"]) for row in rows if isinstance(row, dict))}


def save_models(folder: Path) -> None:
    """A tiny LLaVA and a tiny CLIP, their weights rounded to bfloat16, which halves the files."""
    tiny.save_llava(folder / "llava", tied=True)
    save_model(folder / "clip", text_width=16, vision_width=16)
    for path in folder.glob("*/model.safetensors"):
        weights = {name: value.bfloat16() for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def said_by_the_model() -> dict[str, list[str]]:
    """What is answered to each task's test questions after the task's own stage.

    A random model learns no answers in so few steps; that some of the true ones are what it says makes scores differ
    from 0 and from each other.
    """
    draft = Path("draft")
    draw_tasks(draft / "coin", {})
    settings = ("data.root=draft/coin", "data.prepared=draft/data", "run_dir=draft/run")
    told = [part for text in settings for part in ("--set", text)]
    succeeded("prepare", "recipes/sequence.yaml", *told)
    succeeded("run", "recipes/sequence.yaml", *told)
    return {
        task: [json.loads(line)["prediction"] for line in (draft / f"run/eval/after-{n:02d}/{task}.jsonl").open()]
        for n, task in enumerate(TASKS, start=1)
    }


def draw_tasks(root: Path, said: dict[str, list[str]]) -> None:
    """Three tasks in CoIN layout, one sample in four without an image; test answers are partly what is `said`."""
    for task, (asked, colour, answers) in TASKS.items():
        (root / "instructions" / task).mkdir(parents=True)
        (root / "images").mkdir(exist_ok=True)
        for split, count in (("train", TRAIN), ("test", TEST)):
            entries: list[dict[str, Any]] = []
            for n in range(count):
                entry: dict[str, Any] = {}
                if n % 4 != 3:
                    entry["image"] = f"images/{task}-{split}-{n}.png"
                    (root / entry["image"]).write_bytes(tiny.png((*colour[:2], colour[2] ^ n), size=16))
                question, answer = asked.format(n=n % 3), answers[n % 3 == 2]
                if split == "train":
                    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                    entry |= {"id": f"{task}-{n}", "conversations": turns}
                else:
                    known = said[task][n].strip() if task in said and n != 1 else ""
                    entry |= {"question_id": n, "text": question, "answer": known or answer}
                entries.append(entry)
            (root / "instructions" / task / f"{split}.json").write_text(json.dumps(entries), "utf-8")


def leave_unfinished(name: str, last: str) -> None:
    """Run a recipe and stop it inside its last stage or unit."""
    with stopped_in(Path("runs") / name / f"{last}.unfinished"):
        done = program("run", f"recipes/{name}.yaml")
    if done.code != RESUMABLE or not (Path("runs") / name / f"{last}.unfinished").is_dir():
        sys.exit(f"{name} was to be stopped in {last} and ended with {done.code}:\n{done.out}\n{done.err}")


@contextlib.contextmanager
def stopped_in(folder: Path) -> Iterator[None]:
    """While the block runs, tell this process to stop, as a scheduler does, once so many steps are in a stage's log."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                if (folder / "metrics.jsonl").read_text("utf-8").count("\n") >= STOP_AFTER:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def keep_registered_model() -> None:
    """The folder of the model that a finished run puts into MLflow's registry."""
    uri = "sqlite:///tracking/mlflow.db"
    Path("tracking").mkdir()
    settings = ("run_dir=tracking/run", "tracking.enabled=true", f"tracking.uri={uri}")
    succeeded("run", "recipes/sequence.yaml", *(part for text in settings for part in ("--set", text)))
    models = [path.parent for path in Path(".").rglob("MLmodel") if (path.parent / "artifacts").is_dir()]
    if len(models) != 1:
        sys.exit(f"expected one registered model, found {models}")
    shutil.copytree(models[0], "registered")


if __name__ == "__main__":
    main()
