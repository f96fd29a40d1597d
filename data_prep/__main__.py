"""`python -m data_prep prepare RECIPE` writes shards and keys; `python -m data_prep verify FOLDER` checks them.

`shards --share 3/100`, `join`, `keys --share 3/100` and then `prepare` share the same work among many processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.lazy import lazy
from pipeline.cli.outcome import App, ShowVersion
from pipeline.config.load import load_recipe
from pipeline.files.descriptors import raise_descriptor_limit

if TYPE_CHECKING:
    from data_prep import prepare as preparing
    from data_prep import share as share_of
    from data_prep import verify as verifying
    from data_prep.download import manifest
    from data_prep.download import progress as shown
    from data_prep.download import run as downloading
else:
    preparing, share_of, verifying = lazy("data_prep.prepare"), lazy("data_prep.share"), lazy("data_prep.verify")
    manifest, downloading = lazy("data_prep.download.manifest"), lazy("data_prep.download.run")
    shown = lazy("data_prep.download.progress")

app = App(add_completion=False, help=__doc__)


@app.callback(help=__doc__)
def _before(version: ShowVersion = False) -> None:
    """Options of the program itself."""


RecipeName = Annotated[str, typer.Argument(help="recipe name or file")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a field: a.b=value")]
ShareOption = Annotated[
    str, typer.Option("--share", metavar="NUMBER/COUNT", help="number of this process (from 1) and of all processes")
]


@app.command("prepare")
def prepare_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    skip_bad: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="leave out up to N bad records and list them")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="rewrite data that another recipe or a run depends on")
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=1, metavar="N", help="number of processes that compute keys, each on its own GPU")
    ] = 1,
) -> None:
    """Write the shards and CLIP keys of a recipe; splits that are up to date are kept."""
    changes = [*(overrides or []), *([] if skip_bad is None else [f"data.skip_bad={skip_bad}"])]
    for split in preparing.prepare(load_recipe(recipe, changes), replace=replace, gpus=gpus)["splits"]:
        wrote = " and ".join(split["wrote"])
        typer.echo(
            f"{split['task']}/{split['split']}: {split['samples']} samples in {split['shards']} shards, "
            + (f"wrote {wrote}" if wrote else "up to date")
        )


@app.command("shards")
def shards_command(recipe: RecipeName, share: ShareOption = "1/1", overrides: Overrides = None) -> None:
    """Write this process's share of the shards; run `join` when all processes have ended."""
    wrote = share_of.share_shards(load_recipe(recipe, overrides or []).data, share_of.Share.parse(share))
    typer.echo(f"share {share}: wrote {wrote} shards")


@app.command("join")
def join_command(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Write the index of the shards that `shards` wrote, and shards that are missing."""
    typer.echo(f"{share_of.join_shards(load_recipe(recipe, overrides or []).data)} samples")


@app.command("keys")
def keys_command(recipe: RecipeName, share: ShareOption = "1/1", overrides: Overrides = None) -> None:
    """Compute this process's share of the CLIP keys; `prepare` then merges and verifies them."""
    loaded = load_recipe(recipe, overrides or [])
    wrote = share_of.share_keys(loaded.data, loaded.keys, share_of.Share.parse(share))
    typer.echo(f"share {share}: computed the keys of {wrote} shards")


@app.command("verify")
def verify_command(folder: Annotated[Path, typer.Argument(help="a prepared split, or a folder of them")]) -> None:
    """Check every prepared split under FOLDER: hashes, index, images and keys."""
    for split in verifying.verify_all(folder):
        typer.echo(f"{split}: whole")


@app.command("download")
def download_command(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="coin or ucit")],
    tasks: Annotated[str, typer.Option(metavar="TASK,...", help="tasks to fetch; all if left out")] = "",
    root: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="data.root; by default data/CoIN, data/UCIT")
    ] = None,
    endpoint: Annotated[
        str, typer.Option(metavar="URL", envvar="HF_ENDPOINT", help="the Hugging Face Hub, or a mirror of it")
    ] = "https://huggingface.co",
    only_list: Annotated[
        bool, typer.Option("--list", help="say what would be fetched, from where, and its size")
    ] = False,
) -> None:
    """Fetch the files of a benchmark's tasks, verify and unpack them; say what has to be fetched by hand."""
    found = manifest.benchmark_named(benchmark)
    chosen = found.chosen(task.strip() for task in tasks.split(",") if task.strip())
    downloads = downloading.Downloads(found, chosen, root or Path("data") / found.title, endpoint.rstrip("/"))
    if only_list:
        typer.echo("\n".join(downloads.listed()))
        return
    result = shown.with_progress(downloads)
    typer.echo(f"{result['root']}: fetched {result['fetched']} files, {result['there']} were there")
    for sentence in result["by_hand"]:
        typer.echo(sentence)


def main() -> None:
    """Run the command line; bad input ends with an error message and exit code 2."""
    raise_descriptor_limit()
    app(prog_name="python -m data_prep")


if __name__ == "__main__":
    main()
