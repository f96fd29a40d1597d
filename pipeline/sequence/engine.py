"""One DeepSpeed engine for a whole sequence: trainables keep their shapes, so a stage only sets new values."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.backbones.lmm_families import require_kept_features
from pipeline.config.recipe import Recipe
from pipeline.prompts.model import PromptedLMM
from pipeline.ranks.world import World
from pipeline.training.deepspeed_config import AUTO, accumulation, deepspeed_config
from pipeline.training.hpz import agreed_node_size
from pipeline.training.optimizer_state import ADAM, Moments, give_parts, write_moments

if TYPE_CHECKING:
    from pipeline.data.collate import Batch
    from pipeline.prompts.model import Normaliser


log = logging.getLogger("pipeline.sequence.engine")
PROJECTOR = "projector."  # how the names of a trained projector's weights begin among the trainables


class Engine:
    """The wrapped model with its optimizer; the same object for ZeRO stages 0, 2 and 3, float32 and bfloat16."""

    term_names: tuple[str, ...] = ("loss_lm", "loss_image", "loss_text")
    counts_tokens = True
    moment_kinds: tuple[str, ...] = ADAM  # what the optimizer remembers of each trainable, by torch's names

    def __init__(self, recipe: Recipe, world: World, key_width: int) -> None:
        deepspeed = start_deepspeed()
        config = deepspeed_config(recipe, world.size, agreed_node_size())
        self.zero_stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.micro_batch, self.accumulation = accumulation(recipe, world.size)
        whole = self.zero_stage != 3
        lmm = load_lmm(recipe.model, None if whole else config, world.device if whole else None)
        lmm.cuts = recipe.data.too_long == "truncate"
        method, train = recipe.method, recipe.train
        # As for the DeepSpeed file, `auto` that `pipeline.planning.auto` has not resolved means what it does on CPUs.
        checkpointing = "none" if train.checkpointing == AUTO else train.checkpointing
        if train.vision_features == "kept":
            require_kept_features(lmm.family.kind)
        self.module = PromptedLMM(lmm, method.prompt_length, key_width, method.insertion, checkpointing)
        self.module.to(world.device)
        if self.zero_stage == 3:
            gather_layer_by_layer(self.module)
        groups: list[dict[str, Any]] = [
            {"params": [self.module.prompt], "lr": train.lr_prompt},
            {"params": list(self.module.head.parameters()), "lr": train.lr_head},
        ]
        projector: dict[str, nn.Parameter] = {}
        if train.projector == "trained":
            lmm.train_projector()
            projector = {f"{PROJECTOR}{name}": value for name, value in lmm.projector().named_parameters()}
            groups.append({"params": list(projector.values()), "lr": train.lr_projector})
        self.rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.trainables: dict[str, nn.Parameter] = {
            "prompt": self.module.prompt,
            **{f"head.{name}": parameter for name, parameter in self.module.head.named_parameters()},
            **projector,
        }
        # Every run's first stage starts from the checkpoint's own projector.
        self.base_projector = {name: self._value(parameter) for name, parameter in projector.items()}

    @property
    def replica(self) -> LMM | None:
        """The frozen model, where this rank holds all of it; None under ZeRO-3."""
        return None if self.zero_stage == 3 else self.module.lmm

    def start_stage(self, values: dict[str, Tensor], bank: Tensor, prototype_weight: float) -> None:
        """Begin a stage: trainables (same on every rank) and earlier sets as given, the optimizer as new.

        A trained projector that `values` does not name starts as in the model's checkpoint.
        """
        self.module.start_stage(bank, prototype_weight)
        self.restart({**self.base_projector, **values})

    def restart(self, values: dict[str, Tensor]) -> None:
        """Set the trainables, and the optimizer as new."""
        for name, parameter in self.trainables.items():
            self._set_value(parameter, values[name])
        # Moments and step count of the previous stage must not reach into this one. The step count lives in the
        # wrapped optimizer's state alone (engineering.md B1).
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for state in inner.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0
        self.engine.train()

    def resume_stage(self, values: dict[str, Tensor], step: int, moments: Moments) -> None:
        """Go on with a stage that was begun: trainables and the optimizer's moments as they were after `step` steps."""
        for name, parameter in self.trainables.items():
            self._set_value(parameter, values[name])
        write_moments(self, step, moments)

    def rest(self) -> dict[str, Tensor]:
        """What else, beside trainables and moments, the next steps depend on; the same on every rank."""
        return {}

    def values(self) -> dict[str, Tensor]:
        """The trainables in float32 on the CPU, by name; all ranks must call it."""
        return {name: self._value(parameter) for name, parameter in self.trainables.items()}

    def scale_learning_rates(self, factor: float) -> None:
        """Learning rates of the next optimizer step: each group's rate of the recipe times `factor`."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def accumulate(self, batch: Batch, normaliser: Normaliser) -> Tensor:
        """Forward and backward of one micro-batch; returns its loss terms [3]."""
        loss, terms = self.engine(batch, normaliser)
        self.engine.backward(loss)
        return terms

    def total(self, terms: Sequence[float]) -> float:
        """The loss that is minimised, from its terms."""
        return terms[0] + self.module.prototype_weight * (terms[1] + terms[2])

    def step(self) -> None:
        """Count the micro-batch; the last one of a step updates the trainables."""
        self.engine.step()

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping, where DeepSpeed computed it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """The float32 master that DeepSpeed's optimizer for bfloat16 without ZeRO keeps in lists of its own."""
        masters = getattr(self.optimizer, "fp32_groups", [])
        if not masters:
            return None
        for group, copies in zip(self.optimizer.fp16_groups, masters, strict=True):
            for candidate, master in zip(group, copies, strict=True):
                if candidate is parameter:
                    return master
        return None

    def _value(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master where there is one, else the parameter itself."""
        from deepspeed.utils import safe_get_full_fp32_param

        master = self.master(parameter)
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        return (parameter if master is None else master).detach().float().cpu().clone()

    @torch.no_grad()
    def _set_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set master and working copy: with the master alone the next forward pass would see the old value (B1)."""
        value = value.to(parameter.device)
        master = self.master(parameter)
        if master is not None:
            master.copy_(value)
        give_parts(parameter, value)
        with _whole(parameter, write=True):
            parameter.data.copy_(value)


def start_deepspeed() -> Any:
    """DeepSpeed itself, told to be quiet and to use the process group that is there."""
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_no_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    _skip_compiled_collectives()
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _no_news(record: logging.LogRecord) -> bool:
    """Leave out what DeepSpeed says of every torch optimizer that it does not list; ours are tested here."""
    return "untested optimizer" not in record.getMessage()


def gather_layer_by_layer(module: nn.Module) -> None:
    """Let ZeRO-3 fetch each encoder and decoder layer in one piece, not weight by weight.

    The layers are those transformers names as not to be split. With hooks on every submodule a step of a small model
    spends more time in hooks and tiny gathers than in arithmetic: fewer pieces made it 1.5 times as fast.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    set_z3_leaf_modules(module, sorted(layers), raise_if_not_found=False)


def _skip_compiled_collectives() -> None:
    """Keep DeepSpeed on CPUs from compiling its own collectives for minutes: gloo serves tensors this small."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _whole(parameter: nn.Parameter, write: bool) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


def initial_values(
    module: PromptedLMM, init: str, seed: int, stage: int, previous: Tensor | None = None
) -> dict[str, Tensor]:
    """Starting values of a stage's trainables, a function of (seed, stage) alone and so equal on every rank.

    `init`: vocab_rows (rows of the frozen input embedding picked at random, modalprompt.md 3.2), normal (deviation
    0.02), previous (the previous stage's set `previous` [L, D]; vocab_rows in the first stage). The head starts as
    `torch.nn.Linear` does.
    """
    length, width = module.bank.shape[1:]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stage) % 2**63)
    if init == "normal":
        prompt = torch.randn(length, width, generator=generator) * 0.02
    else:
        words = usable_rows(module.lmm)
        prompt = module.lmm.vocabulary_rows(words[torch.randint(len(words), (length,), generator=generator)])
        if init == "previous" and previous is not None:
            prompt = previous.clone()
    values = {"prompt": prompt}
    for name, parameter in module.head.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        bound = module.lmm.width**-0.5  # both layers read vectors of the model's width
        values[f"head.{name}"] = (torch.rand(tuple(shape), generator=generator) * 2 - 1) * bound
    return values


def usable_rows(lmm: LMM) -> Tensor:
    """Numbers of the vocabulary rows that are ordinary words: no special tokens, no padding of the table."""
    special: set[Any] = {*lmm.tokenizer.all_special_ids, lmm.image_token}
    size = min(len(lmm.tokenizer), lmm.model.config.text_config.vocab_size)
    return torch.tensor([row for row in range(size) if row not in special])
