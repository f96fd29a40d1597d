"""Files that are cut off or have a bit turned over: a sentence that says which, never wrong numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.bench import Bench, Row, run_of
from tests.faults.kills import die_in_a_write

Damage = Callable[[Path], None]


def truncated(path: Path) -> None:
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path, place: float = 0.5) -> None:
    """Turn over one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def damaged_data(bench: Bench) -> Iterator[Row]:
    """Shard, index and keys of a training split: refused by name, mended by `prepare`, and then the same run."""
    split = bench.folder / "data" / "T0" / "train"
    for file in ("shard-000000.tar", "index.parquet", "keys.safetensors"):
        for damage in (truncated, flipped):
            kept = shutil.copytree(split, bench.folder / "kept")
            damage(split / file)
            recipe = bench.recipe(f"data-{file}-{damage.__name__}")
            code, process = bench.run(recipe)
            if code == 0:  # nothing that is read has changed, or something is overlooked
                passed, happens = not bench.differences(recipe), "not noticed, and the result is the same"
            else:
                if "Remove the folder" in process.said():
                    shutil.rmtree(split)
                codes = (code, bench.start(["prepare", str(recipe)]).wait(), bench.run(recipe)[0])
                wrong = bench.differences(recipe)
                passed = codes == (2, 0, 0) and not wrong
                happens = "refused; `prepare` writes it anew as the message says; equal in the end"
                happens += "" if passed else f" (exit codes {codes}, differing: {wrong})"
            shutil.rmtree(split, ignore_errors=True)
            kept.rename(split)
            yield Row(f"{file} {damage.__name__}", happens, "nothing", str(code), passed, process.said())


def damaged_checkpoints(bench: Bench) -> Iterator[Row]:
    """A checkpoint inside a stage: the one before is used."""
    for file in ("state.safetensors", "state.json"):
        for damage in (truncated, flipped):
            recipe = bench.recipe(f"step-{file}-{damage.__name__}", train__save_steps=1)
            bench.run(recipe, die_in_a_write("checkpoint in a stage", 16, 1.0))  # after the fourth checkpoint
            newest = sorted(bench.stage(recipe, 1, unfinished=True).glob("resume/step-????????"))[-1]
            damage(newest / file)
            code, process = bench.run(recipe)
            said = process.said("The checkpoint ")
            passed = code == 0 and "is skipped" in said and not bench.differences(recipe)
            fault = f"{file} of the newest checkpoint {damage.__name__}"
            happens = "the one before is used; equal in the end"
            yield Row(fault, happens, "steps since the one before", str(code), passed, said)


def damaged_stages(bench: Bench) -> Iterator[Row]:
    """A finished stage: refused with what to do, and trained again when that is done."""
    for file in ("prompts.safetensors", "meta.json", "COMPLETE"):
        for damage in (truncated, flipped):
            recipe = bench.recipe(f"stage-{file}-{damage.__name__}")
            shutil.copytree(run_of(bench.whole), run_of(recipe))
            shutil.copy(bench.folder / "recipes" / f"{recipe.stem}.yaml", run_of(recipe) / "config.yaml")
            damage(bench.stage(recipe) / file)
            code, process = bench.run(recipe)
            shutil.rmtree(bench.stage(recipe))
            again, _ = bench.run(recipe)
            passed = (code, again) == (2, 0) and not bench.differences(recipe)
            fault = f"{file} of a finished stage {damage.__name__}"
            happens = "refused; trained again once it is removed"
            yield Row(fault, happens, "that stage", str(code), passed, process.said())


def damaged_results(bench: Bench) -> Iterator[Row]:
    """Files that the run writes for others and can write again."""
    for file in ("run.json", "matrix.json", "eval/after-02/T0.jsonl", "eval/after-01/sets.json"):
        recipe = bench.recipe(f"result-{Path(file).name}")
        shutil.copytree(run_of(bench.whole), run_of(recipe))
        shutil.copy(bench.folder / "recipes" / f"{recipe.stem}.yaml", run_of(recipe) / "config.yaml")
        truncated(run_of(recipe) / file)
        code, process = bench.run(recipe)
        passed = code == 0 and not bench.differences(recipe)
        yield Row(
            f"{file} truncated", "written anew; equal to the whole run", "nothing", str(code), passed, process.said()
        )


def changed_data(bench: Bench) -> Row:
    """A data folder is changed under a finished run: every verb that needs it refuses, and the run stays finished."""
    recipe = bench.recipe("changed-data")
    run = run_of(recipe)
    shutil.copytree(run_of(bench.whole), run)
    shutil.copy(bench.folder / "recipes" / f"{recipe.stem}.yaml", run / "config.yaml")
    before = {name: (run / name).read_bytes() for name in ("matrix.json", "run.json")}
    split, other = (bench.folder / "data" / task / "train" for task in ("T1", "T0"))
    kept = split.rename(bench.folder / "kept")
    shutil.copytree(other, split)
    process = bench.start(["evaluate", str(run)])
    codes = [process.wait(), bench.run(recipe)[0]]
    unchanged = all((run / name).read_bytes() == content for name, content in before.items())
    shutil.rmtree(split)
    kept.rename(split)
    codes.append(bench.start(["evaluate", str(run)]).wait())
    passed = codes == [2, 2, 0] and unchanged and not bench.differences(recipe)
    happens = "refused; matrix and state stay those of the finished run, and all is well when the data is back"
    return Row("a data folder changed under a finished run", happens, "nothing", str(codes[0]), passed, process.said())


def image_bomb(bench: Bench) -> Row:
    """A small file that would decode to 400 million pixels."""
    from PIL import Image

    from tests import tiny_clip

    root = tiny_clip.save_coin(bench.folder / "bomb", "T0", train=4, test=3)
    Image.new("1", (20000, 20000)).save(root / "images" / "T0-train-1.png")
    recipe = bench.recipe("bomb", tasks=1, data__root=str(root), data__prepared=str(bench.folder / "bomb-data"))
    process = bench.start(["prepare", str(recipe)])
    code = process.wait()
    said = process.said()
    skipped = bench.start(["prepare", str(recipe), "--skip-bad", "1"]).wait()
    passed = code == 2 and "T0-train-1.png" in said and skipped == 0
    happens = "refused by name before it is decoded; `--skip-bad 1` leaves it out"
    return Row("image bomb in the data", happens, "nothing", str(code), passed, said)
