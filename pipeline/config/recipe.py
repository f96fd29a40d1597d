"""The recipe: everything a run depends on, typed and frozen, loaded from YAML, unknown keys refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.base import PREPARED, FileRecipe, LoopConfig, Name, Section, TrackingConfig, each_once
from pipeline.config.messages import sentence
from pipeline.config.task_file import with_task_files
from pipeline.config.yaml_file import CONFIG, apply_overrides, find_recipe, read_recipe
from pipeline.data.origin import LIMIT, shared_or_each
from pipeline.errors import UserError, nearest
from pipeline.files.paths import GivenPath

_TASK_CONTENT = {"limit_train", "limit_test", "train_files", "test_files", "annotations"}
PACKAGE = Path(__file__).resolve().parents[1]  # the folder pipeline/
PROJECT = PACKAGE.parent  # a checkout, or what a wheel was installed into; data_prep/ is there too


class TaskConfig(Section):
    """One task of the sequence."""

    name: Name = Field(description="folder of the task under the data's instructions/")
    metric: str = Field("exact", description="how answers are scored; a name that pipeline.metrics.scoring knows")
    max_new_tokens: int = Field(16, ge=1, description="longest answer that is generated, in tokens")
    limit_train: int | None = Field(
        None,
        ge=1,
        description="use only the first so many training samples; those that data.validation_share holds out are "
        "among them",
    )
    limit_test: int | None = Field(None, ge=1, description="use only the first so many test samples")
    train_files: tuple[GivenPath, ...] = Field(
        (), description="files of the training split in the task's folder; empty: train.json and its numbered parts"
    )
    test_files: tuple[GivenPath, ...] = Field(
        (), description="files of the test split in the task's folder; empty: test.json or val.json and numbered parts"
    )
    annotations: GivenPath | None = Field(
        None,
        description="file under the root with further answers to the test questions (ten annotators, choices, "
        "captions); null: the benchmarks' own file names are looked for",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        from pipeline.metrics.scoring import metric_names  # here: a recipe can be read before the metrics are imported

        if metric not in metric_names():
            raise ValueError(f"expected one of {', '.join(metric_names())}.{nearest(metric, metric_names())}")
        return metric


class DataConfig(Section):
    """Where samples come from and where they are kept prepared."""

    source: Literal["coin", "generated"] = Field(description="coin: read root as it is; generated: draw it there first")
    root: GivenPath = Field(description="folder in CoIN layout: instructions/<Task>/{train,test}.json and images")
    prepared: GivenPath = Field(
        PREPARED,
        description="folder of the shards: <prepared>/<task>/<split>/; {settings} is filled in from what decides on "
        "their content (source, root, limits, files, generator's seed, repeated ids, the CLIP of the keys)",
    )
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="the tasks in the order they are learned")
    prepare_first: bool = Field(False, description="true: run and train prepare what is missing before they start")
    shard_samples: int = Field(1000, ge=1, description="samples per shard")
    workers: int = Field(2, ge=1, description="threads that decode images while preparing")
    seed: int = Field(0, ge=0, description="seed of the generator; the run's own seed does not change the data")
    validation_share: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="share of each task's training samples that no stage learns from: choices such as the gate are "
        "made with them, never with test samples; chosen by a hash of their ids; 0: none",
    )
    validation_most: int = Field(500, ge=1, description="most samples of one task that are held out")
    scoring: Literal["fixed", "compat"] = Field(
        "fixed", description="compat: score as the official scripts do, faults included (pipeline/metrics/compat.py)"
    )
    skip_bad: int = Field(0, ge=0, description="leave out up to so many bad records of all tasks together")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "refuse",
        description="samples of more tokens than model.max_length, and images that the model's processor cannot use, "
        "both counted before training. refuse: the start ends with a sentence; skip: training leaves them out, tests "
        "count them as wrong; truncate: the beginning of the question is cut off, further turns before it",
    )
    repeated_ids: Literal["refuse", "number"] = Field(
        "refuse", description="number: a record whose id was used before is kept as id#2, id#3, ..."
    )

    @field_validator("tasks")
    @classmethod
    def _unique_names(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        each_once("task", (task.name for task in tasks))
        return tasks

    def split_path(self, task: str, split: str) -> Path:
        """Return the folder that holds one prepared split (train or test) of a task."""
        return Path(self.prepared) / task / split

    def split_settings(self, task: TaskConfig, split: str) -> dict[str, Any]:
        """What decides on the content of one split, beside the files under the root; see `pipeline.data.origin`."""
        train = split == "train"
        settings: dict[str, Any] = {"source": self.source, "repeated_ids": self.repeated_ids}
        settings[LIMIT] = task.limit_train if train else task.limit_test
        settings["files"] = list(task.train_files if train else task.test_files)
        if not train:
            settings["annotations"] = task.annotations
        if self.source == "generated":
            settings["seed"] = self.seed
        return settings


class ModelConfig(Section):
    """The frozen multimodal model."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the frozen weights and the step")
    attn_implementation: str = Field("sdpa", description="attention kernel, as transformers names it")
    max_length: int = Field(2048, ge=1, description="longest sequence in tokens, prompts and image included")
    template: Literal["auto", "vicuna_v1"] = Field(
        "auto",
        description="the conversation: that of the checkpoint's chat template (without one, USER: and ASSISTANT:), or "
        "LLaVA-1.5's with its system sentence",
    )
    image_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of one image, by the processor's own knob (pixels of Qwen2.5-VL, tiles of InternVL, "
        "the longest edge of Idefics3 and SmolVLM, pan-and-scan of Gemma 3, grids of LLaVA-NeXT); null: as the "
        "checkpoint says",
    )
    image_padding: Literal["none", "square"] = Field(
        "none", description="square: pad images to squares with the processor's mean colour first, as LLaVA's own code"
    )

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)


class KeysConfig(Section):
    """The frozen CLIP that turns images and questions into keys."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a CLIP checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    text_feature: Literal["projected", "pooled"] = Field(
        "projected", description="projected: CLIP's joint space; pooled: before the projection, as in the official code"
    )
    text_truncation: Literal["head", "tail"] = Field(
        "head", description="which end of a question that CLIP's 77 tokens cannot hold is kept; head: CLIP's own way"
    )
    batch: int = Field(64, ge=1, description="samples per forward pass while preparing")

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)

    @property
    def source(self) -> tuple[str, str | None, Literal["projected", "pooled"], Literal["head", "tail"]]:
        """What names the CLIP and its features to `key_identity` and `KeyEncoder`."""
        return self.location, self.revision, self.text_feature, self.text_truncation


class EarlierGate(Section):
    """A gate that a run had before another one was chosen: what was measured with it stays as it was."""

    stages: int = Field(ge=0, description="after so many stages and fewer the gate was this one, for training and rows")
    gate: float | None = Field(ge=0, description="see method.gate")


class MethodConfig(Section):
    """What is learned per task and which sets are inserted."""

    name: Literal["modalprompt", "sequential", "independent", "joint", "zero_shot"] = Field(
        "modalprompt", description="the continual-learning method"
    )
    prompt_length: int = Field(10, ge=1, description="L, vectors per prompt set")
    init: Literal["vocab_rows", "normal", "previous"] = Field("vocab_rows", description="where a new prompt set starts")
    k: int = Field(3, ge=1, description="most prompt sets inserted for one sample, 1 to the number of tasks")
    selection: Literal["topk", "all", "current", "oracle"] = Field(
        "topk",
        description="which sets a sample gets: the k most similar; all, unselected; the newest; those of its own task "
        "(told, not routed)",
    )
    insertion: Literal["after_bos", "before_image", "after_image"] = Field(
        "after_bos",
        description="where sets stand: after the first token, directly before the image, or directly behind it, where "
        "what precedes them is computed without gradients and once for all questions about an image",
    )
    text_only: Literal["insert", "skip"] = Field(
        "insert", description="skip: questions without an image are answered without sets, as in the official code"
    )
    gate: float | None = Field(
        None,
        ge=0,
        description="insert a set only if its similarity is at least the best minus this; null: always k (paper)",
    )
    earlier_gates: tuple[EarlierGate, ...] = Field(
        (), description="the gates before it was changed, which `add --gate` writes here"
    )
    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")
    prototype_weight: float = Field(1.0, ge=0, description="weight of the two prototype terms in the loss")

    def after(self, stages: int) -> MethodConfig:
        """The method as it is after so many stages, with the gate of that time."""
        gates = [earlier.gate for earlier in self.earlier_gates if stages <= earlier.stages]
        return self.model_copy(update={"gate": gates[0] if gates else self.gate, "earlier_gates": ()})

    def with_gate(self, gate: float | None, stages: int) -> MethodConfig:
        """The method with another gate from the stage behind the first `stages` on."""
        if gate == self.after(stages + 1).gate:
            return self
        kept = [earlier for earlier in self.earlier_gates if earlier.stages < stages]
        before = EarlierGate(stages=stages, gate=self.after(stages).gate)
        return self.model_copy(update={"gate": gate, "earlier_gates": (*kept, before)})


class TrainConfig(LoopConfig):
    """Optimisation of one stage."""

    deepspeed: GivenPath = Field(
        "auto",
        description="DeepSpeed file; batch, precision, clipping stay here; auto: ZeRO-2 where the run fits into its "
        "GPUs with it by the memory plan, else ZeRO-3 (on several nodes with a copy of the weights on each where that "
        "fits), which CPUs always get",
    )
    epochs: float = Field(10, gt=0, description="passes over a task's training samples")
    steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps per stage; overrides epochs, unless those are given later: by "
        "--set, or in a recipe that extends the one with the steps",
    )
    global_batch: int = Field(16, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="samples per rank and forward; null: no accumulation")
    lr_prompt: float = Field(gt=0, description="learning rate of the prompt set")
    lr_head: float = Field(gt=0, description="learning rate of the projection head")
    projector: Literal["frozen", "trained"] = Field(
        "frozen", description="trained: the model's image projector learns too, so earlier tasks' answers may change"
    )
    vision_features: Literal["computed", "kept"] = Field(
        "computed",
        description="kept: what the vision tower makes of each training image is computed once, before the stage, and "
        "read from float16 files beside the prepared data from then on; for models whose images have equally many "
        "tokens",
    )
    lr_projector: float = Field(2e-5, gt=0, description="learning rate of the projector when it is trained")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's betas"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="learning rate after the warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising learning rate")
    warmup_curve: Literal["linear", "log"] = Field(
        "linear", description="how it rises; log: as DeepSpeed's WarmupLR, which the official run gets"
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="activations of the decoder's layers that are computed again instead of kept: of no layer, of "
        "every second, of all; saves memory and costs time, never changes the loss; auto: as few as fit into the GPUs "
        "by the memory plan, none without GPUs",
    )
    length_buckets: bool = Field(
        False,
        description="batches of samples of about the same length, questions without an image apart from the others: "
        "less padding, every sample still once per epoch; not together with questions_per_image",
    )
    questions_per_image: int = Field(
        4,
        ge=1,
        description="with method.insertion after_image: most questions about one image that stand together in the "
        "order of training, so that they share its computation; 1: the order of the other insertions",
    )

    @model_validator(mode="after")
    def _micro_divides_global(self) -> TrainConfig:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}; "
                f"expected one of {', '.join(map(str, divisors(self.global_batch)))}"
            )
        return self


class EvaluateConfig(Section):
    """Generation of the answers that are scored."""

    batch: int = Field(50, ge=1, description="samples per generate call and rank")
    zero_shot: bool = Field(True, description="score the frozen model alone before the first stage")
    ahead: bool = Field(
        False, description="also score each task just before its own stage, for forward transfer; costs a test set each"
    )
    repetition_penalty: Annotated[float, Field(gt=0)] | Literal["checkpoint"] = Field(
        1.0,
        description="factor on the scores of tokens that the answer has already; 1: none, so that boxes and numbers "
        "may repeat digits; checkpoint: what the model's generation_config.json says",
    )
    reuse: bool = Field(True, description="keep an answer when a later stage selects the same sets")
    share_images: bool = Field(
        False,
        description="compute an image once for all questions about it that get the same sets; always on with "
        "method.insertion after_image",
    )


class Recipe(FileRecipe):
    """A runnable thing: data, model, method and training, with one seed."""

    filled_in: ClassVar[tuple[str, ...]] = ("name", "method", "seed")

    seed: int = Field(0, ge=0, description="seed of initialisation and sample order")
    run_dir: GivenPath = Field(
        "runs/{name}-{method}-s{seed}", description="folder; {name}, {method}, {seed} are filled in"
    )
    data: DataConfig
    model: ModelConfig
    keys: KeysConfig
    method: MethodConfig = MethodConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_order_of_samples(self) -> Recipe:
        if self.method.insertion == "after_image" and self.train.length_buckets and self.train.questions_per_image > 1:
            raise ValueError(
                "with method.insertion after_image train.questions_per_image orders the samples by image and "
                "train.length_buckets by length; expected questions_per_image 1 or length_buckets false"
            )
        return self

    @model_validator(mode="after")
    def _gradients_reach_the_projector(self) -> Recipe:
        if self.method.insertion == "after_image" and self.train.projector == "trained":
            raise ValueError(
                "method.insertion after_image computes the image without gradients, so train.projector trained would "
                "never learn; expected train.projector frozen or another insertion"
            )
        return self

    def data_settings(self) -> dict[str, Any]:
        """The settings that decide on the content of the prepared data; those at their defaults are left out.

        Tasks count by what is said about them and not by their names: any choice of tasks in any order shares a folder
        where all are read alike. `skip_bad` only allows what it allows, so it does not count.
        """
        data, keys = self.data, self.keys
        said = {
            task.name: task.model_dump(mode="json", include=_TASK_CONTENT, exclude_defaults=True) for task in data.tasks
        }
        found = {
            "source": data.source,
            "root": os.path.normpath(data.root),
            "tasks": shared_or_each(said),
            "repeated_ids": data.repeated_ids if data.repeated_ids != "refuse" else None,
            "seed": data.seed if data.source == "generated" else None,
            "keys": keys.model_dump(mode="json", exclude={"batch"}, exclude_defaults=True),
        }
        return {name: value for name, value in found.items() if value not in (None, {})}

    @classmethod
    def as_a_run_meant(cls, fields: Any) -> Any:
        """The fields of a run's config.yaml, completed where it was written before a field that changes results."""
        if not isinstance(fields, dict) or not isinstance(fields.get("data"), dict):
            return fields
        # Runs from before samples were held out have trained on all of them.
        return {**fields, "data": {"validation_share": 0.0, **fields["data"]}}

    @property
    def run_path(self) -> Path:
        """Folder of this run."""
        return Path(self.run_dir.format(name=self.name, method=self.method.name, seed=self.seed))


def recipe_kind(name_or_path: str | Path) -> str | None:
    """Return what a recipe file says in `kind`: clip for a benchmark of prompt methods, None for a task sequence."""
    kind = read_recipe(find_recipe(str(name_or_path))).get("kind")
    if kind not in (None, "clip"):
        raise UserError(f"recipe '{name_or_path}': kind is {kind!r}, expected clip, or none for a task sequence.")
    return kind


def run_kind(run_path: Path) -> str | None:
    """Return the kind of recipe a run was made with; None also where there is no run, which its reader says."""
    path = run_path / CONFIG
    return recipe_kind(path) if path.is_file() else None


def one_kind(runs: Sequence[Path]) -> str | None:
    """Return the kind of some runs, as `run_kind` does; UserError when some are benchmarks and some sequences."""
    kinds = {path: run_kind(path) for path in runs if (path / CONFIG).is_file()}
    if len(set(kinds.values())) > 1:
        words = {"clip": "a benchmark of prompt methods on CLIP", None: "a task sequence"}
        listed = ", ".join(f"'{path}' is {words[kind]}" for path, kind in kinds.items())
        raise UserError(
            f"these runs are of different kinds, whose scores cannot stand in one table: {listed}; report "
            "those of one kind together."
        )
    return run_kind(runs[0])


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe of that name or file with `a.b=value` overrides applied.

    Raises UserError, one sentence naming each field in question, what was found and what was expected.
    """
    if recipe_kind(name_or_path) == "clip":
        raise UserError(
            f"recipe '{name_or_path}' is a benchmark of prompt methods on CLIP; expected a task sequence. A benchmark "
            "is prepared and run whole, by `python -m pipeline prepare` and `run`."
        )
    path = find_recipe(str(name_or_path))
    fields = read_recipe(path)
    if path.name == CONFIG and (path.parent / "run.json").is_file():
        fields = Recipe.as_a_run_meant(fields)
    fields = with_task_files(apply_overrides(fields, overrides))
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"recipe '{name_or_path}': {sentence(error, Recipe)}") from error


def load_run(run_path: Path) -> Recipe:
    """Return the recipe a run folder was made with; UserError when the folder is no run."""
    if not (run_path / CONFIG).is_file():
        runs = [found.parent.name for found in run_path.parent.glob("*/config.yaml")]
        what = "is a file" if run_path.is_file() else "does not exist"
        found = "has no config.yaml" if run_path.is_dir() else what
        raise UserError(
            f"'{run_path}' {found}; expected the folder of a run, which `python -m pipeline run RECIPE` makes."
            + nearest(run_path.name, runs)
        )
    if run_kind(run_path) == "clip":
        raise UserError(
            f"'{run_path}' is a benchmark of prompt methods on CLIP; expected the run of a task sequence. What it "
            f"learned is in {run_path / 'units'}; "
            f"pipeline.clip.benchmark.checkpoint.classifier_from loads it for any classes."
        )
    return as_recorded(load_recipe(run_path / CONFIG), run_path)


def as_recorded(recipe: Recipe, run_path: Path) -> Recipe:
    """The recipe with what a run meant that was begun before one of its fields existed; others stay as they are."""
    path, field = run_path / CONFIG, "repetition_penalty"
    if field in recipe.evaluate.model_fields_set or not path.is_file():
        return recipe
    if field in (read_recipe(path).get("evaluate") or {}):
        return recipe
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={field: "checkpoint"})})


def locate(path: str) -> str:
    """Return `path` if it exists here, else the same path inside the project if that exists, else `path` (a hub id)."""
    if not Path(path).exists() and (PROJECT / path).exists():
        return str(PROJECT / path)
    return path


def divisors(number: int) -> list[int]:
    """Return the whole numbers that divide one, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]
