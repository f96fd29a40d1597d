"""The registry of extensions that recipes name: methods, routers, selection rules and other kinds.

A name stands for a target "module:attribute", which is imported when it is used. So this module imports nothing that it
names and can lie below all of it.

Names come from three places: `BUILT_IN`; the entry points of installed packages, in the group
`continual_prompts.<kind>` (`continual_prompts.rules` for a selection rule); and `register`, for the process that calls
it. Instead of a name, a recipe may give a target, such as `my_rules:NearestTwo` for a module on PYTHONPATH.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipeline.errors import UserError, nearest

GROUP = "continual_prompts."  # prefix of an entry point group; the kind follows

BUILT_IN: dict[str, dict[str, str]] = {
    "methods": {
        "modalprompt": "pipeline.methods.modalprompt:ModalPrompt",
        "sequential": "pipeline.methods.sequential:Sequential",
        "independent": "pipeline.methods.independent:Independent",
        "joint": "pipeline.methods.joint:Joint",
        "zero_shot": "pipeline.methods.zero_shot:ZeroShot",
        "task_lora": "pipeline.methods.task_lora:TaskLora",
        "modular": "pipeline.methods.modular:Modular",
        "l2p": "pipeline.methods.l2p:L2P",
        "dualprompt": "pipeline.methods.dualprompt:DualPrompt",
        "coda": "pipeline.methods.coda:Coda",
        "lora": "pipeline.methods.lora:Lora",
        "lora_merged": "pipeline.methods.lora_merged:LoraMerged",
        "olora": "pipeline.methods.olora:OLora",
        "moelora": "pipeline.methods.moelora:MoELora",
        "hide": "pipeline.methods.hide:HiDe",
        "disco": "pipeline.methods.disco:Disco",
        "core_moe": "pipeline.methods.core_moe:CoreMoE",
        "ewc": "pipeline.methods.ewc:Ewc",
        "lwf": "pipeline.methods.lwf:Lwf",
    },
    "parts": {
        "input_rows": "pipeline.prompts.parts.input_rows:InputRows",
        "low_rank": "pipeline.prompts.parts.low_rank:LowRank",
        "deep": "pipeline.prompts.parts.deep_rows:DeepRows",
        "prefix": "pipeline.prompts.parts.prefix:PrefixRows",
        "prompt_pool": "pipeline.prompts.parts.prompt_pool:PromptPoolPart",
        "dual_prefix": "pipeline.prompts.parts.dual_prefix:DualPrefix",
        "components": "pipeline.prompts.parts.components:Components",
        "fused_low_rank": "pipeline.prompts.parts.fused_low_rank:FusedLowRank",
        "experts": "pipeline.prompts.parts.experts:Experts",
        "core": "pipeline.prompts.parts.core:Core",
    },
    "routers": {
        "prototype": "pipeline.prompts.routers.mean:Prototype",
        "mean": "pipeline.prompts.routers.mean:Mean",
        "two_means": "pipeline.prompts.routers.two_means:TwoMeans",
        "centres": "pipeline.prompts.routers.centres:Centres",
        "ridge": "pipeline.prompts.routers.ridge:Ridge",
        "random_ridge": "pipeline.prompts.routers.ridge:RandomRidge",
        "key": "pipeline.prompts.routers.learned_key:LearnedKey",
    },
    "rules": {
        "topk": "pipeline.prompts.rules.top_k:TopK",
        "oracle": "pipeline.prompts.rules.top_k:Oracle",
        "all": "pipeline.prompts.rules.fixed:All",
        "current": "pipeline.prompts.rules.fixed:Current",
        "own": "pipeline.prompts.rules.fixed:Own",
        "first": "pipeline.prompts.rules.fixed:First",
        "none": "pipeline.prompts.rules.fixed:Nothing",
        "hard": "pipeline.prompts.rules.mixture:Hard",
        "soft": "pipeline.prompts.rules.mixture:Soft",
        "weighted": "pipeline.prompts.rules.mixture:Weighted",
    },
    "terms": {
        "prototype": "pipeline.prompts.terms:PrototypeTerm",
        "key_pull": "pipeline.prompts.key_terms:KeyPull",
        "orthogonal": "pipeline.prompts.key_terms:Orthogonal",
        "orthogonal_subspaces": "pipeline.prompts.low_rank_terms:OrthogonalSubspaces",
        "elastic": "pipeline.prompts.low_rank_terms:Elastic",
        "distilled": "pipeline.prompts.low_rank_terms:Distilled",
    },
    "sources": {
        "coin": "data_prep.sources.coin:CoinSplit",
        "generated": "data_prep.sources.generated:Generated",
    },
    "metrics": {
        name: f"pipeline.metrics.named:{name}"
        for name in (
            *("anls", "bleu_4", "caption", "cider", "contains", "exact", "exact_ci", "gqa", "grounding", "imagenet"),
            *("iou", "iou_compat", "ocrvqa", "rouge_l", "scienceqa", "textvqa", "vizwiz", "vqa", "vqav2"),
        )
    },
    "clip_methods": {
        "zero_shot": "pipeline.clip.methods.zero_shot:ZeroShot",
        "coop": "pipeline.clip.methods.coop:CoOp",
        "cocoop": "pipeline.clip.methods.cocoop:CoCoOp",
        "kgcoop": "pipeline.clip.methods.kgcoop:KgCoOp",
        "vpt": "pipeline.clip.methods.vpt:VPT",
        "ivlp": "pipeline.clip.methods.ivlp:IVLP",
        "maple": "pipeline.clip.methods.maple:MaPLe",
        "mpl": "pipeline.clip.methods.mpl:MPL",
        "dpl": "pipeline.clip.methods.dpl:DPL",
    },
    # By `model_type` of config.json.
    "lmm_families": {
        "llava": "pipeline.backbones.families.llava:Llava",
        "fast_vlm": "pipeline.backbones.families.llava:FastVLM",
        "llava_next": "pipeline.backbones.families.llava:LlavaNext",
        "qwen2_5_vl": "pipeline.backbones.families.qwen2_5_vl:Qwen25VL",
        "internvl": "pipeline.backbones.families.internvl:InternVL",
        "idefics3": "pipeline.backbones.families.idefics3:Idefics3",
        "smolvlm": "pipeline.backbones.families.idefics3:SmolVLM",
        "gemma3": "pipeline.backbones.families.gemma3:Gemma3",
    },
}
# The base class of a kind's targets, which are subclasses of it; metrics are instances.
BASES = {
    "parts": "pipeline.prompts.parts.base:Part",
    "terms": "pipeline.prompts.terms:Term",
    "methods": "pipeline.methods.base:Method",
    "routers": "pipeline.prompts.routers.base:Router",
    "rules": "pipeline.prompts.rules.base:Rule",
    "sources": "data_prep.sources.base:SourceSplit",
    "metrics": "pipeline.metrics.metric:Metric",
    "clip_methods": "pipeline.clip.methods.base:PromptLearner",
    "lmm_families": "pipeline.backbones.families.base:LMMFamily",
}
# The word for an extension of a kind, in messages.
WORDS = {
    "methods": "method",
    "parts": "part",
    "terms": "term of the loss",
    "routers": "router",
    "rules": "selection rule",
    "sources": "data format",
    "metrics": "metric",
    "clip_methods": "method",
    "lmm_families": "model family",
}

# A target in place of a name.
_TARGET = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")

_registered: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Contested:
    """Marks a name for which installed packages have different targets."""

    packages: Mapping[str, str]  # names of the packages by target

    @property
    def said(self) -> str:
        """The targets and their packages, for a message."""
        return " and ".join(f"{target} by {package}" for target, package in sorted(self.packages.items()))


def register(kind: str, name: str, target: Any) -> None:
    """Register `name` for `target`, "module:attribute" or the object itself, in this process.

    Processes that a launcher starts do not have it; for training on several ranks use an entry point, or the target
    itself in the recipe. Raises UserError for an unknown kind, and where another target has the name.
    """
    known = _targets(kind)
    if name in known and known[name] != target:
        raise UserError(f"There is a {WORDS[kind]} '{name}' already; register this one under another name.")
    _registered.setdefault(kind, {})[name] = target


def names(kind: str) -> list[str]:
    """The names of a kind, those of the project first."""
    return list(_targets(kind))


def is_target(name: str) -> bool:
    """Whether a text is a target "module:attribute" instead of a name."""
    return _TARGET.fullmatch(name) is not None


def knows(kind: str, name: str) -> bool:
    """Whether `load` accepts this name: one of `names`, or a target."""
    return name in _targets(kind) or is_target(name)


def unknown(kind: str, name: str) -> str:
    """The error message for an unknown name."""
    known = names(kind)
    near = nearest(name, known)
    # A run folder moved to another machine names what a package registered on the first one.
    elsewhere = "" if near else ", or a name that a package gives once it is installed here"
    return f"there is no {WORDS[kind]} '{name}'; expected one of {', '.join(known)}{elsewhere}.{near}"


def provide(kind: str, name: str) -> str:
    """Advice for a file from elsewhere, such as an adapter, that needs a name which is unknown here."""
    return (
        f"install the package that has '{name}' among its entry points {GROUP}{kind}, or call "
        f'pipeline.config.registry.register("{kind}", "{name}", ...) before.'
    )


def load(kind: str, name: str) -> Any:
    """Import the target of a name.

    Raises UserError for an unknown name, a target that cannot be imported, and one without the kind's base class.
    """
    if not knows(kind, name):
        sentence = unknown(kind, name)
        raise UserError(sentence[0].upper() + sentence[1:])
    if name in BUILT_IN[kind]:
        return _imported(BUILT_IN[kind][name])
    target = _targets(kind).get(name, name)
    if isinstance(target, Contested):
        raise UserError(
            f"The {WORDS[kind]} '{name}' is {target.said}; expected one package with this name. Uninstall the other, "
            "or write the target itself in place of the name."
        )
    if not isinstance(target, str):
        return _of_its_kind(kind, name, target)
    try:
        found = _imported(target)
    except Exception as error:  # importing another package's code may raise anything
        raise UserError(
            f"The {WORDS[kind]} '{name}' is {target}, which cannot be imported ({type(error).__name__}: {error}); "
            "expected module:attribute of an installed package or of a module on PYTHONPATH."
        ) from error
    return _of_its_kind(kind, name, found)


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _of_its_kind(kind: str, name: str, found: Any) -> Any:
    """The target `found`; UserError where it does not have the base class of the kind."""
    base = _imported(BASES[kind])
    wanted = "an instance" if kind == "metrics" else "a subclass"
    right = isinstance(found, base) if kind == "metrics" else isinstance(found, type) and issubclass(found, base)
    if not right:
        raise UserError(
            f"The {WORDS[kind]} '{name}' is {found!r}; expected {wanted} of {BASES[kind].replace(':', '.')}, as "
            "docs/extending.md describes."
        )
    return found


def _targets(kind: str) -> dict[str, Any]:
    if kind not in BUILT_IN:
        raise UserError(f"There is no kind of extension '{kind}'; expected one of {', '.join(BUILT_IN)}.")
    # The project's own names come first, so that an installed package cannot change the meaning of a recipe.
    own = BUILT_IN[kind]
    added = {**_entry_points()[kind], **_registered.get(kind, {})}
    return own | {name: target for name, target in added.items() if name not in own}


@functools.cache
def _entry_points() -> dict[str, dict[str, str | Contested]]:
    """Targets of installed packages by kind and name; cached, because this reads the metadata of every package."""
    installed = entry_points()
    return {kind: _by_name(installed.select(group=f"{GROUP}{kind}")) for kind in BUILT_IN}


def _by_name(points: Iterable[EntryPoint]) -> dict[str, str | Contested]:
    found: dict[str, dict[str, str]] = {}  # packages by name and target
    for point in points:
        found.setdefault(point.name, {})[point.value] = point.dist.name if point.dist else "a package"
    return {name: Contested(said) if len(said) > 1 else next(iter(said)) for name, said in found.items()}
