"""The model card of an adapter."""

from __future__ import annotations

import shlex

from pipeline.adapter.meta import Meta
from pipeline.methods import make_method

SHOWN = ("last", "average", "forgetting", "retention")

SHIPPED = "data_prep/nano/checkpoints"  # models that are part of this repository


def card(meta: Meta, shape: tuple[int, ...]) -> str:
    """Return the model card in Markdown; `shape` is that of the prompts [T, L, D]."""
    # The Hub links base_model only where it is an id, not a local folder.
    is_hub_id = meta.model.path.count("/") == 1 and not meta.model.path.startswith((".", "/", "~"))
    front = ["---", "library_name: continual-prompts", "pipeline_tag: image-text-to-text"]
    front += [f"base_model: {meta.model.path}"] if is_hub_id else []
    front += [f"license: {meta.licence}"] if meta.licence else []
    front += ["tags: [prompt-tuning, continual-learning, vision-language]", "---"]
    scores = [
        f"| {name} | {'–' if meta.scores.get(name) is None else format(meta.scores[name], '.1f')} |"
        for name in meta.tasks
        if name in meta.scores or name in meta.sets
    ]
    metrics = ", ".join(f"{name} {meta.metrics[name]:.1f}" for name in SHOWN if meta.metrics.get(name) is not None)
    sets, length, width = shape
    # Modules of another kind, such as low-rank updates, insert no vectors.
    prompts = f"{sets} prompt sets of {length} vectors (width {width})"
    learned = prompts if length else f"{sets} modules"
    return "\n".join(
        [
            *front,
            "",
            f"# Prompt sets for {', '.join(meta.sets)}",
            "",
            f"{learned} for the frozen model "
            f"{_named(meta.model.path)}, learned one after the other with the method {meta.method.name}. "
            + _choice(meta),
            "",
            "## Scores",
            "",
            "| task | score (percent, test split, after the last stage) |",
            "|---|---|",
            *scores,
            "",
            *([f"Over the sequence: {metrics}.", ""] if metrics else []),
            "## Use",
            "",
            *_use(meta),
            "",
            "The frozen models are not part of this folder. Their fingerprints are, and others are refused:",
            f"model `{meta.base_model}`, CLIP weights `{meta.keys.get('weights_sha256', '?')}`.",
            "",
            "## Licences",
            "",
            f"* These prompt sets: {meta.licence or 'not stated; export with --licence'}.",
            f"* The model and the CLIP they steer: the licences of `{meta.model.path}` and `{meta.clip.path}`.",
            "* The data they were learned from: the licences of the tasks' data sets.",
            "",
        ]
    )


def _use(meta: Meta) -> list[str]:
    """How to install what loads the adapter, and how to ask it, in lines of Markdown."""
    # No question of the training data stands here: a card is published, the data may not be.
    sets = ", ".join(meta.sets)
    told = bool(meta.sets) and make_method(meta.method).needs_task
    extra = '"FOLDER[quantised]"' if meta.model.quantization != "none" else "FOLDER"
    task, option = (f', task="{meta.sets[0]}"', f" --task {shlex.quote(meta.sets[0])}") if told else ("", "")
    return [
        "continual-prompts is on no package index: `FOLDER` is the folder of its source, or a wheel built from it. In "
        f"place of `QUESTION` write one of your own, worded as in the training data of {sets or 'the tasks'}.",
        "",
        "```",
        f"pip install {extra}",
        f'python -m pipeline predict THIS_FOLDER --image picture.png --question "QUESTION"{option}',
        "```",
        "",
        "```python",
        "from pipeline.adapter import load_adapter",
        'adapter = load_adapter("THIS_FOLDER")  # model=... and clip=... where the frozen models are elsewhere',
        f'print(adapter.ask("QUESTION", "picture.png"{task}).text)',
        "```",
    ]


def _named(path: str) -> str:
    """The model's name for readers without a copy of this repository."""
    shipped = path.startswith(f"{SHIPPED}/")
    return f"`{path}`" + " (a small model that the source of continual-prompts has in that folder)" * shipped


def _choice(meta: Meta) -> str:
    """How sets are selected, in one or two sentences."""
    method = make_method(meta.method)
    routing = method.routing
    if routing.router is None or not routing.rule.compares:
        told = " and has to be told with it" if method.needs_task else ""
        return f"Which sets a question gets does not depend on its image and text{told}."
    gate, share = getattr(meta.method, "gate", None), getattr(meta.method, "share", None)
    by_vectors = "A question gets the sets whose prototypes are most similar to its image and its text"
    by_router = (
        f"A question gets the sets of the tasks that the router {routing.router.word} finds in its image and text"
    )
    bound = f", those within {gate} of the best" if gate is not None else ""
    bound += f", those at least {share:g} times as probable as the best" if share is not None else ""
    kept = (
        " The folder holds CLIP vectors of some training samples of each task, of which the routing is computed."
        if routing.keeps_keys
        else ""
    )
    return (
        f"{by_router if routing.router.needs_keys else by_vectors} as the CLIP `{meta.clip.path}` sees them: at most "
        f"{routing.rule.most(max(len(meta.sets), getattr(meta.method, 'k', 1)))}{bound}.{kept}"
    )
