"""The embedded model and its tasks: `train` makes the model anew, `tasks` writes the tasks."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from data_prep.nano import CHECKPOINTS
from pipeline.cli.outcome import App

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
    import torch

    from data_prep.nano.behaviours import RowMaker
    from data_prep.nano.keys import train_keys
    from data_prep.nano.language import Speaker, build_llava, measure, train_language
    from data_prep.nano.tokenizer import build_clip_tokenizer, build_tokenizer, save_processors
    from data_prep.nano.vision import draw_pool, encode, train_vision

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.time()
    pool, fresh = draw_pool(scenes, seed=1), draw_pool(min(2000, scenes), seed=2)
    _say(f"drew {len(pool.scenes)} scenes", started)
    tower = train_vision(pool, vision_minutes, device)
    features, pooled = encode(tower, pool.pixels, device)
    _say("vision tower trained and features cached", started)
    clip = train_keys(tower, pooled, pool.scenes, build_clip_tokenizer(), key_minutes, device)
    clip.cpu().half().save_pretrained(out / "clip")
    _say("key CLIP trained", started)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    speaker = Speaker.of(build_llava(tower.cpu(), tokenizer), features).to(device)
    unseen = (RowMaker(tokenizer, fresh.scenes, seed=4), encode(tower.to(device), fresh.pixels, device)[0])

    def save() -> None:
        kept, speaker.features = speaker.features, features[:0]  # no need to copy the cache
        copy.deepcopy(speaker).cpu().finished().half().save_pretrained(out / "llava")
        speaker.features = kept

    train_language(speaker, RowMaker(tokenizer, pool.scenes, seed=3), unseen, language_minutes, save=save)
    save()
    save_processors(out / "llava", out / "clip")
    speaker.features = unseen[1]
    typer.echo(measure(speaker, unseen[0], batches=20))
    _say(f"saved in {out}", started)


@app.command()
def tasks(
    root: Annotated[Path, typer.Argument(help="folder to write, in CoIN layout")],
    seed: Annotated[int, typer.Option(help="seed of pictures and questions")] = 0,
) -> None:
    """Write the six embedded tasks."""
    from data_prep.nano.tasks import write_coin

    write_coin(root, seed)
    typer.echo(f"six tasks in {root}")


def _say(what: str, started: float) -> None:
    print(f"[{(time.time() - started) / 60:5.1f} min] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    app(prog_name="data_prep.nano")
