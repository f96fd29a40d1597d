"""The embedded models and tasks: `train` trains the models, `tasks` and `example` write tasks."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.nano import CHECKPOINTS
from pipeline.cli.lazy import lazy
from pipeline.cli.outcome import App

if TYPE_CHECKING:
    import torch

    from data_prep.nano import behaviours, example, keys, language, vision
    from data_prep.nano import tasks as nano_tasks
    from data_prep.nano import tokenizer as tokens
else:
    torch = lazy("torch")
    behaviours = lazy("data_prep.nano.behaviours")
    example = lazy("data_prep.nano.example")
    keys = lazy("data_prep.nano.keys")
    language = lazy("data_prep.nano.language")
    nano_tasks = lazy("data_prep.nano.tasks")
    tokens = lazy("data_prep.nano.tokenizer")
    vision = lazy("data_prep.nano.vision")

app = App(help=__doc__, add_completion=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="folder for the two checkpoints, llava/ and clip/")] = CHECKPOINTS,
    scenes: Annotated[int, typer.Option(help="pictures to draw and learn from")] = 50_000,
    vision_minutes: Annotated[float, typer.Option(help="wall clock for the vision tower")] = 16,
    key_minutes: Annotated[float, typer.Option(help="wall clock for the key CLIP")] = 5,
    language_minutes: Annotated[float, typer.Option(help="wall clock for projector and decoder")] = 95,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train vision tower, key CLIP and language model from scratch and save them as ordinary checkpoints (float16)."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.time()
    pool, fresh = vision.draw_pool(scenes, seed=1), vision.draw_pool(min(2000, scenes), seed=2)
    _say(f"drew {len(pool.scenes)} scenes", started)
    tower = vision.train_vision(pool, vision_minutes, device)
    features, pooled = vision.encode(tower, pool.pixels, device)
    _say("vision tower trained and features cached", started)
    clip = keys.train_keys(tower, pooled, pool.scenes, tokens.build_clip_tokenizer(), key_minutes, device)
    clip.cpu().half().save_pretrained(out / "clip")
    _say("key CLIP trained", started)
    tokenizer = tokens.build_tokenizer()
    torch.manual_seed(0)
    speaker = language.Speaker.of(language.build_llava(tower.cpu(), tokenizer), features).to(device)
    unseen_features = vision.encode(tower.to(device), fresh.pixels, device)[0]
    unseen = (behaviours.RowMaker(tokenizer, fresh.scenes, seed=4), unseen_features)

    def save() -> None:
        kept, speaker.features = speaker.features, features[:0]  # so that deepcopy does not copy the cached features
        copy.deepcopy(speaker).cpu().finished().half().save_pretrained(out / "llava")
        speaker.features = kept

    rows = behaviours.RowMaker(tokenizer, pool.scenes, seed=3)
    language.train_language(speaker, rows, unseen, language_minutes, save=save)
    save()
    tokens.save_processors(out / "llava", out / "clip")
    speaker.features = unseen[1]
    typer.echo(language.measure(speaker, unseen[0], batches=20))
    _say(f"saved in {out}", started)


@app.command()
def tasks(
    root: Annotated[Path, typer.Argument(help="folder to write, in CoIN layout")],
    seed: Annotated[int, typer.Option(help="seed of pictures and questions")] = 0,
    resembling: Annotated[bool, typer.Option("--resembling", help="with the eight tasks that resemble them")] = False,
) -> None:
    """Write the six embedded tasks."""
    nano_tasks.write_coin(root, seed, more=resembling)
    typer.echo(f"{len(nano_tasks.ALL_TASKS if resembling else nano_tasks.TASKS)} tasks in {root}")


@app.command("example")
def draw_example(
    folder: Annotated[Path, typer.Argument(help="folder to write photos/ and shelf.csv to")],
    samples: Annotated[int, typer.Option(min=4, help="pictures, with one question each")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="seed of pictures and questions")] = 0,
) -> None:
    """Draw the tutorial's sample task as a user has one: a folder of pictures and a table."""
    table = example.write_example(folder, samples, seed)
    typer.echo(f"{samples} pictures in {table.parent / example.PICTURES}, their questions and answers in {table}")


def _say(what: str, started: float) -> None:
    print(f"[{(time.time() - started) / 60:5.1f} min] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    app(prog_name="python -m data_prep.nano")
