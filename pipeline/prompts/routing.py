"""Routing: a router's scores and a rule's choice, for the samples of a stage, of a test set or of a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pipeline.config.method import Choice
from pipeline.data.keys import Keys
from pipeline.data.selection import Selection
from pipeline.prompts.routers.base import Router, States, make_router
from pipeline.prompts.routers.mean import SAMPLES_AT_ONCE
from pipeline.prompts.rules.answers import checked, try_rule
from pipeline.prompts.rules.base import Rule, make_rule

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys


class DeclaresRouting(Protocol):
    """What a method says of its routing, see `pipeline.methods.base.Method`."""

    @property
    def router(self) -> Choice | None: ...

    @property
    def rule(self) -> Choice: ...

    @property
    def options(self) -> Any: ...

    @property
    def skips_text(self) -> bool: ...


@dataclass(frozen=True)
class Routing:
    """How samples come to their modules.

    `router` None: nothing is recognised, so scores mean nothing and the rule looks at their number alone. With
    `skip_text` a question without an image gets no module at inference, as in ModalPrompt's code.
    """

    router: Router | None
    rule: Rule
    skip_text: bool = False

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        """How well each of N samples fits each of T tasks [N, T]."""
        if self.router is None:
            return torch.zeros(1, 1).expand(len(keys.text), len(states))
        return self.router.scores(keys, states)

    def shown(self, scores: Tensor) -> Tensor:
        """The scores [N, T] for people and files; [N, 0] where they mean nothing."""
        return scores if self.router is not None else scores[:, :0]

    def training(self, keys: AnyKeys, states: States) -> Selection:
        """The earlier modules beside the one that is trained, for every training sample of a stage.

        `states` are those of the earlier tasks; the stage's own is taken from the same `keys`.
        """
        samples = len(keys.text)
        if not len(states):
            return Selection.none(samples)
        if self.router is None or not self.rule.compares:
            same = torch.zeros(1, 1).expand(samples, len(states))
            return checked(self.rule, self.rule.training(same, None), samples, len(states))
        own = States([self.router.observe(keys)]) if self.rule.needs_own else None
        parts = []
        # In parts: the scores of a million samples for a thousand tasks would take gigabytes at once.
        for part in _in_parts(keys):
            reference = None if own is None else self.router.scores(part, own)[:, 0]
            chosen = self.rule.training(self.router.scores(part, states), reference)
            parts.append(checked(self.rule, chosen, len(part.text), len(states)))
        return Selection.joined(parts)

    def inference(self, scores: Tensor, tasks: Tensor | int, has_image: Tensor) -> Selection:
        """The modules of N samples, given their scores [N, T], tasks [N] (or one for all) and `has_image` [N]."""
        if not isinstance(tasks, Tensor):
            tasks = torch.full((len(scores),), tasks, dtype=torch.long)
        modules = scores.shape[1]
        answer = self.rule.inference(scores, tasks)
        chosen = checked(self.rule, answer, len(scores), modules, self.rule.most(modules))
        return chosen.without(~has_image.bool()) if self.skip_text else chosen


def _in_parts(keys: AnyKeys) -> Iterator[Keys]:
    rows = (part.split(SAMPLES_AT_ONCE) for part in (keys.image, keys.text, keys.has_image))
    return (Keys(image, text, has_image, keys.identity) for image, text, has_image in zip(*rows, strict=True))


def routing_of(method: DeclaresRouting) -> Routing:
    """The routing that a method declares by names, with its options; UserError where its rule does not work."""
    router = None if method.router is None else make_router(method.router, method.options)
    rule = make_rule(method.rule, method.options)
    try_rule(rule)
    return Routing(router, rule, method.skips_text)
