"""`predict` of a benchmark's run: the class of an image by the prompts that one of its units learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.backbones.base_model import fingerprint
from pipeline.clip.benchmark.checkpoint import LearnedPrompts, classifier_of, load_prompts
from pipeline.clip.images.pixels import Pixels
from pipeline.clip.recipe import load_benchmark
from pipeline.clip.towers.backbone import backbone_folder, backbone_source, load_backbone
from pipeline.config.paths import locate
from pipeline.data.pictures import decode_image
from pipeline.errors import UserError, nearest
from pipeline.runs.claim import check_stage
from pipeline.runs.layout import COMPLETE, CONFIG, UNFINISHED, UNITS

SHOWN = 5  # classes whose probabilities are listed


def classify(run: Path, image: Path | None, unit: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Return {answer, unit, probabilities} of an image: the most likely of the classes that a unit was trained on.

    Args:
        run: folder of a benchmark's run.
        image: the image file.
        unit: name of the unit, such as `coop-pets-s1`; None: the only one that is finished.
        model: location of the frozen CLIP, None: as recorded.

    Raises UserError without an image, for one that cannot be read, for a run without finished units, an unknown or
    missing name where there are several, a damaged unit, and another CLIP than it was trained on.
    """
    if image is None:
        raise UserError("A benchmark on CLIP names the class of an image; give it with --image FILE.")
    try:
        picture = decode_image(image.read_bytes())
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"--image: '{image}' is not a readable image ({error}); expected PNG or JPEG.") from error
    folder = _unit_folder(run, unit)
    learned = load_prompts(folder)
    assert learned is not None, "only finished units are chosen"
    recorded = load_benchmark(str(run / CONFIG)).model
    place = recorded.location if model is None else locate(model)
    revision = recorded.revision if model is None else None
    found = fingerprint(backbone_source(place, revision), learned.meta.get("base_model"))
    check_stage(folder, learned.meta, {"base_model": found})
    return {"unit": folder.name, **_probabilities(learned, picture, place, revision, recorded.dtype)}


def _unit_folder(run: Path, unit: str | None) -> Path:
    """The folder of a finished unit by its name, or of the only one."""
    finished = sorted(path.parent for path in (run / UNITS).glob(f"*/{COMPLETE}") if UNFINISHED not in path.parent.name)
    names = [folder.name for folder in finished]
    if not finished:
        raise UserError(f"'{run}' has no finished unit; expected a run that has learned something. Run it to its end.")
    if unit is None and len(finished) == 1:
        return finished[0]
    if unit is None:
        raise UserError(f"'{run}' has {len(names)} finished units; choose one with --unit: {', '.join(names)}.")
    if unit not in names:
        raise UserError(
            f"'{run}' has no finished unit '{unit}'; expected one of {', '.join(names)}.{nearest(unit, names)}"
        )
    return run / UNITS / unit


@torch.no_grad()
def _probabilities(
    learned: LearnedPrompts, picture: Any, place: str, revision: str | None, precision: str
) -> dict[str, Any]:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    backbone, tokenizer = load_backbone(place, revision, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = learned.meta["classes"]
    module = classifier_of(learned, backbone.to(device), backbone.words(tokenizer), names).to(device)
    pixels = Pixels(backbone_folder(place, revision)).plain(picture)[None].to(device)
    chances = module.logits(pixels)[0].double().softmax(dim=0).cpu()
    if not chances.isfinite().all():
        raise UserError("The classifier gives no finite numbers for this image; its prompts are unusable. Train again.")
    best = chances.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return {
        "answer": names[best[0]],
        "probability": round(chances[best[0]].item(), 4),
        "probabilities": {names[place]: round(chances[place].item(), 4) for place in best},
    }
