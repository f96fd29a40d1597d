"""What the memory of a run depends on of its recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.method import MethodOptions
from pipeline.config.models import ModelConfig
from pipeline.config.recipe import Recipe
from pipeline.config.train import TrainConfig


@dataclass(frozen=True)
class Workload:
    """What is trained how, and how many answers of what length are generated."""

    model: ModelConfig
    method: MethodOptions
    train: TrainConfig
    key_width: int  # of the CLIP keys, which a projection head maps to
    tasks: int  # number of tasks: so many sets may be chosen from for one sample
    answers: int  # generated at once in evaluation
    answer_length: int  # tokens of the longest answer of any task
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)  # the engine that generates them

    @classmethod
    def of(cls, recipe: Recipe, key_width: int) -> Workload:
        """The workload of a recipe whose CLIP's keys have this width."""
        tasks = recipe.data.tasks
        longest = max(task.max_new_tokens for task in tasks)
        sections = (recipe.model, recipe.method, recipe.train)
        return cls(*sections, key_width, len(tasks), recipe.evaluate.batch, longest, recipe.evaluate)

    def trained_with(self, train: TrainConfig) -> Workload:
        """The same with other settings of training."""
        return replace(self, train=train)

    def evaluated_by(self, engine: str) -> Workload:
        """The same with another `evaluate.engine`."""
        return replace(self, evaluate=self.evaluate.model_copy(update={"engine": engine}))
