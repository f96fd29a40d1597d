"""The command line of the benchmarks: `python -m pipeline.bench step --size small`.

One file because every benchmark is a few lines here, and all share the options and the way results are shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from pipeline.bench.several_values import SeveralValues
from pipeline.bench.sizes import SIZES
from pipeline.bench.tables import show
from pipeline.cli.lazy import lazy
from pipeline.cli.outcome import App, ShowVersion
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    from pipeline.bench import clip as clip_bench
    from pipeline.bench import data as data_bench
    from pipeline.bench import evaluate as evaluate_bench
    from pipeline.bench import gpu as gpu_bench
    from pipeline.bench import keys as keys_bench
    from pipeline.bench import loader as loader_bench
    from pipeline.bench import low_rank as low_rank_bench
    from pipeline.bench import operations as operations_bench
    from pipeline.bench import serve as serve_bench
    from pipeline.bench import serve_clients as clients_bench
    from pipeline.bench import startup as startup_bench
    from pipeline.bench import step as step_bench
    from pipeline.bench import switches as switches_bench
    from pipeline.bench import tasks as tasks_bench
    from pipeline.bench import tracking as tracking_bench
    from pipeline.bench.routing import run as routing_bench
else:
    startup_bench, step_bench = lazy("pipeline.bench.startup"), lazy("pipeline.bench.step")
    operations_bench, switches_bench = lazy("pipeline.bench.operations"), lazy("pipeline.bench.switches")
    evaluate_bench = lazy("pipeline.bench.evaluate")
    tasks_bench = lazy("pipeline.bench.tasks")
    loader_bench = lazy("pipeline.bench.loader")
    low_rank_bench = lazy("pipeline.bench.low_rank")
    data_bench = lazy("pipeline.bench.data")
    keys_bench = lazy("pipeline.bench.keys")
    clip_bench = lazy("pipeline.bench.clip")
    serve_bench = lazy("pipeline.bench.serve")
    clients_bench = lazy("pipeline.bench.serve_clients")
    tracking_bench = lazy("pipeline.bench.tracking")
    gpu_bench = lazy("pipeline.bench.gpu")
    routing_bench = lazy("pipeline.bench.routing.run")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
SizeName = Annotated[str, typer.Option("--size", help=f"Shape of the model: {', '.join(SIZES)}.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved repeats; ratios are medians over them.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16.")]

app = App(help=__doc__, add_completion=False)


@app.callback()
def _before(version: ShowVersion = False) -> None:
    """Speed and memory measurements: ratios of variants, measured in one process on the same weights and samples."""


@app.command()
def step(
    size: SizeName = "small",
    samples: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 4,
    rounds: Rounds = 3,
    variants: Annotated[str, typer.Option(help="Some of the variants, with commas between them.")] = "",
    device: Device = "cpu",
    dtype: Precision = "float32",
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers of the language model.")] = None,
    as_json: AsJson = False,
) -> None:
    """A training step: this project against the official implementation and PEFT's prompt tuning."""
    chosen = tuple(filter(None, variants.split(","))) or step_bench.VARIANTS
    show(step_bench.bench_step(_size(size), samples, rounds, chosen, device, dtype, layers), as_json)


@app.command()
def switches(
    size: SizeName = "small",
    samples: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 8,
    rounds: Rounds = 3,
    only: Annotated[str, typer.Option(help="Some of the switches, with commas between them.")] = "",
    device: Device = "cpu",
    dtype: Precision = "float32",
    as_json: AsJson = False,
) -> None:
    """The switches for speed of a training step, each against the same step without it."""
    chosen = tuple(filter(None, only.split(","))) or switches_bench.SWITCHES
    show(switches_bench.bench_switches(_size(size), samples, rounds, chosen, device, dtype), as_json)


@app.command()
def operations(
    samples: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 4, as_json: AsJson = False
) -> None:
    """Operations of a training step at every size, by formulas; nothing is run."""
    show(operations_bench.bench_operations(samples), as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    limit: Annotated[int, typer.Option(min=1, help="Test samples per task.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The accuracy matrix of a run, against evaluation sample by sample."""
    show(evaluate_bench.bench_evaluate(run, limit), as_json)


@app.command()
def tasks(
    size: SizeName = "small",
    few: Annotated[int, typer.Option(min=4, help="Tasks to compare with.")] = 8,
    many: Annotated[int, typer.Option(min=4, help="Tasks that must cost no more.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Samples per step and answer.")] = 2,
    rounds: Rounds = 5,
    insertion: Annotated[str, typer.Option(help="Where the sets stand in the training step.")] = "after_bos",
    router: Annotated[str | None, typer.Option(help="Name of a router; none: the default recipe's.")] = None,
    key_width: Annotated[
        int | None, typer.Option(min=1, help="Width of the routing keys, CLIP-L's is 768; none: the size's.")
    ] = None,
    device: Device = "cpu",
    dtype: Precision = "float32",
    as_json: AsJson = False,
) -> None:
    """Training steps and answers with many tasks against few."""
    use = tasks_bench.SetsInUse(insertion, router, key_width)
    show(tasks_bench.bench_tasks(_size(size), few, many, samples, rounds, use, device, dtype), as_json)


@app.command(cls=SeveralValues)
def routing(
    tasks: Annotated[int, typer.Option(help="Tasks of the probe: 40 made by hand, above that a grid.")] = 40,
    prepared: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER...", help="Folders of prepared tasks instead of the probe, as one sequence."),
    ] = None,
    routers: Annotated[
        list[str] | None,
        typer.Option(metavar="ROUTER...", help="Names, or options as in '{name: mean, image_weight: 0.3}'; none: all."),
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Sets per sample; none: the default recipe's.")] = None,
    left_out: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave N tasks out in turn, and count questions told as unfamiliar.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probe's pictures and questions.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Test samples of each task of the probe.")] = 200,
    pictures: Annotated[int, typer.Option(min=100, help="Training pictures of each family of the probe.")] = 2000,
    keys_per_task: Annotated[int, typer.Option(min=1, help="Samples of a task whose keys are kept.")] = 128,
    ceiling: Annotated[
        bool, typer.Option("--ceiling", help="Also fit a network on many samples per task, which no router has.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Routers side by side, with CLIP keys alone: tasks that resemble each other, or prepared ones."""
    asked = routing_bench.Asked(routing_bench.default_k() if k is None else k, left_out, keys_per_task)
    found = routing_bench.bench_routing(
        tasks, prepared or (), routers or (), asked, seed, routing_bench.amounts_of(pictures, samples), ceiling
    )
    routing_bench.show_routing(found, as_json)


@app.command("low-rank")
def low_rank(
    size: SizeName = "small",
    many: Annotated[int, typer.Option(min=9, help="Tasks that must cost no more than eight.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Samples per step and answer.")] = 4,
    rounds: Rounds = 5,
    device: Device = "cpu",
    dtype: Precision = "float32",
    as_json: AsJson = False,
) -> None:
    """Low-rank modules of eight tasks with weights by sample against one module, and of many tasks against eight."""
    show(low_rank_bench.bench_low_rank(_size(size), many, samples, rounds, device, dtype), as_json)


@app.command()
def loader(
    folder: Annotated[Path | None, typer.Option(help="A prepared split; none: photographs of noise.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to write where no split is given.")] = 2000,
    rounds: Rounds = 5,
    as_json: AsJson = False,
) -> None:
    """Reading by index against sequential WebDataset reading of the same shards."""
    show(loader_bench.bench_loader(folder, samples, rounds), as_json)


@app.command()
def data(
    records: Annotated[int, typer.Option(min=200, help="Records of all tasks together; CoIN: 958000.")] = 20_000,
    folder: Annotated[Path | None, typer.Option(help="Where the data is kept; none: a temporary one.")] = (None),
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Indices and keys of so many records, and one shard for all of them.")
    ] = False,
    key_width: Annotated[
        int | None, typer.Option(min=1, help="Width of the generated keys; by default 768, with --index-only 16.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another version of this project, measured on the same data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Costs of large data on a synthetic CoIN, without a large model: check, prepare, first step, resuming."""
    show(data_bench.bench_data(records, folder, index_only, key_width, against), as_json)


@app.command()
def keys(
    size: SizeName = "base",
    samples: Annotated[int, typer.Option(min=1, help="Photographs.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 2,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """CLIP keys: the share of the time spent in CLIP's towers."""
    show(keys_bench.bench_keys(_size(size), samples, batch, workers, device), as_json)


@app.command()
def clip(
    size: Annotated[str, typer.Option("--size", help="Shape of the CLIP: nano, small, vitb16.")] = "small",
    classes: Annotated[int, typer.Option(min=2, help="Class names.")] = 100,
    images: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Texts at a time, where they go in chunks.")] = 25,
    batches: Annotated[int, typer.Option(min=1, help="Batches of an evaluation.")] = 4,
    rounds: Rounds = 3,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """The exact speed-ups of prompt learning on CLIP, each against the plain path."""
    _require_size(size, list(clip_bench.SIZES))
    show(clip_bench.bench_clip(size, classes, images, rounds, chunk, batches, device), as_json)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or an exported adapter.")],
    clients: Annotated[int, typer.Option(min=1, max=128, help="Threads that ask at once.")] = 16,
    requests: Annotated[int, typer.Option(min=2, max=10_000, help="Questions in all.")] = 128,
    engines: Annotated[
        str, typer.Option(help="What answers: own, and vLLM with vocabulary or parts, with commas between them.")
    ] = "own",
    vllm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The command `vllm` of another environment.")
    ] = None,
    engine_args: Annotated[
        str, typer.Option(metavar="TEXT", help="Further options of `vllm serve`, in one text.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Services under load, as processes on loopback, against one question at a time."""
    names = tuple(engines.split(","))
    for name in names:
        if name not in serve_bench.ENGINES:
            known = ", ".join(serve_bench.ENGINES)
            raise UserError(f"No engine '{name}'; expected some of {known}.{nearest(name, list(serve_bench.ENGINES))}")
    show(serve_bench.bench_serve(folder, clients, requests, serve_bench.Engines(names, vllm, engine_args)), as_json)


@app.command(cls=SeveralValues)
def clients(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or an adapter; none: random prompt sets."),
    ] = None,
    before: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Another checkout of the project.")] = None,
    clients: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER...", min=1, max=500, help="Numbers of clients; none: 1 20 200.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="Most questions of a measurement.")] = 400,
    tokens: Annotated[int, typer.Option(min=1, max=128, help="Most tokens of an answer.")] = 6,
    rounds: Rounds = 3,
    batch: Annotated[int | None, typer.Option(min=1, help="The services' --batch; none: their defaults.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of the service by its number of clients, against that of another checkout by turns."""
    show(clients_bench.bench_clients(folder, before, clients or (1, 20, 200), requests, tokens, rounds, batch), as_json)


@app.command()
def startup(rounds: Rounds = 3, as_json: AsJson = False) -> None:
    """Seconds until a verb of the embedded model has done its work, each in a process of its own."""
    show(startup_bench.bench_startup(rounds), as_json)


@app.command()
def tracking(
    runs: Annotated[int, typer.Option(min=1, help="Runs of the large store, parents and stages together.")] = 2000,
    rounds: Rounds = 3,
    as_json: AsJson = False,
) -> None:
    """Seconds until MLflow lists a store of many runs, against one of a single sequence."""
    show(tracking_bench.bench_tracking(runs, rounds), as_json)


@app.command()
def gpu(
    size: SizeName = "7b",
    samples: Annotated[int, typer.Option(min=4, help="Samples per training step.")] = 8,
    answers: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    rounds: Rounds = 5,
    device: Device = "cuda",
    out: Annotated[Path | None, typer.Option(help="JSON file to write after every section.")] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds after which no section is begun.")] = 540,
    as_json: AsJson = False,
) -> None:
    """All measurements that need a GPU: steps, checkpointing, answers with and without sets, ZeRO-2 and ZeRO-3."""
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError("There is no GPU here; start this where there is one, or give --device cpu and --size tiny.")
    show(gpu_bench.bench_gpu(_size(size), samples, answers, rounds, device, out, deadline), as_json)


def _size(name: str) -> str:
    _require_size(name, list(SIZES))
    return name


def _require_size(name: str, known: list[str]) -> None:
    if name not in known:
        raise UserError(f"No size '{name}'; expected one of {', '.join(known)}.{nearest(name, known)}")


if __name__ == "__main__":
    app(prog_name="python -m pipeline.bench")
