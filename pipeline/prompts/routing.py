"""Routing: a router's scores and a rule's choice, for the samples of a stage, of a test set or of a request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config.method import Choice
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.data.keys import AnyKeys, Keys, in_parts
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.prompts.calibration import Calibration, calibrate
from pipeline.prompts.routers.base import Router, State, States, make_router, require_numbers
from pipeline.prompts.routers.kept_keys import PER_TASK, kept_sample, require_finite
from pipeline.prompts.routers.mean import SAMPLES_AT_ONCE
from pipeline.prompts.routers.ready import ready_states
from pipeline.prompts.rules.answers import checked, try_rule
from pipeline.prompts.rules.base import Rule, make_rule
from pipeline.prompts.unfamiliar import unfamiliar

log = logging.getLogger(__name__)


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
class Routed:
    """How N samples came to their modules.

    `probabilities` and `unfamiliar` (whether a sample resembles no task) are None where the states keep no keys to
    calibrate the scores with.
    """

    selection: Selection
    scores: Tensor  # [N, T] by the router; [N, 0] of a method without one
    probabilities: Tensor | None = None  # [N, T]
    unfamiliar: Tensor | None = None  # [N] bool


@dataclass(frozen=True)
class Routing:
    """How samples come to their modules.

    Args:
        router: scores the tasks; None: nothing is recognised, and the rule looks at the number of scores alone.
        rule: chooses modules by the scores.
        skip_text: a question without an image gets no module at inference, as in ModalPrompt's code.
        unfamiliar: what becomes of a sample that resembles no task; only with zero_shot it gets no module.
        keys_per_task: samples of a task whose keys its state keeps.
    """

    router: Router | None
    rule: Rule
    skip_text: bool = False
    unfamiliar: Unfamiliar = "answer"
    keys_per_task: int = PER_TASK

    @property
    def keeps_keys(self) -> bool:
        """Whether a task's state keeps a sample of its training keys."""
        router = self.router
        return router is not None and (router.needs_keys or self.rule.probable or self.unfamiliar != "answer")

    def observe(self, keys: AnyKeys, learned: State | None = None, task: str = "the task") -> dict[str, Tensor]:
        """The state of a task: what its router makes of its training samples' keys, and the keys that are kept.

        Args:
            keys: those of the task's training samples.
            learned: what training has made, in place of what the router makes in closed form.
            task: its name, for messages.
        """
        if self.router is None:
            return dict(learned or {})
        if self.keeps_keys or learned is None:
            require_finite(keys, task)
        state = dict(self.router.observe(keys) if learned is None else learned)
        if self.keeps_keys:
            if self.router.needs_keys and len(keys.text) < self.router.fewest:
                log.warning(
                    "%s has %d training samples, and the router %s needs %d; as long as a task has fewer, samples are "
                    "routed by the means of the tasks' keys.",
                    *(task, len(keys.text), self.router.word, self.router.fewest),
                )
            state |= kept_sample(keys, self.keys_per_task)
        return state

    def scores(self, keys: AnyKeys, states: States, whose: str = "those that are routed") -> Tensor:
        """How well each of N samples fits each of T tasks [N, T]; UserError where keys or states are not finite."""
        if self.router is None or not len(states):
            return torch.zeros(1, 1).expand(len(keys.text), len(states))
        router, ready = self._ready(states)
        found = router.scores(keys, ready)
        if not bool(found.isfinite().all()):
            require_finite(keys, whose)
            require_numbers(found, router)
        return found

    def shown(self, scores: Tensor) -> Tensor:
        """The scores [N, T] for people and files; [N, 0] where they mean nothing."""
        return scores if self.router is not None else scores[:, :0]

    def calibration(self, states: States) -> Calibration | None:
        """What makes the router's scores probabilities, made once; None where a state keeps no keys."""
        if self.router is None or not len(states):
            return None
        router, ready = self._ready(states)
        return ready.once(_calibration(router), lambda: calibrate(router, ready))

    def fitted(self, states: States) -> dict[str, Any]:
        """Whatever is made of all states together, to be stored and given to `use` later."""
        if self.router is None or not len(states):
            return {}
        router, ready = self._ready(states)
        found = router.fitted(ready)
        made = {_calibration(router): self.calibration(states)}
        return {**made, router.label: {name: found[name] for name in found if name not in router.passing}}

    def use(self, states: States, made: Mapping[str, Any]) -> None:
        """Take over what `fitted` has made of equal states."""
        if self.router is not None and len(states):
            self._ready(states)[1].put(made)

    def _ready(self, states: States) -> tuple[Router, States]:
        """The router that scores, and the states with all that it needs."""
        assert self.router is not None
        router = self.router
        return states.once(f"ready for {router.label}", lambda: ready_states(router, states))

    @property
    def finds(self) -> bool:
        """Whether the modules of a sample are found by comparing it with the tasks."""
        return self.router is not None and self.rule.compares and not self.rule.needs_task

    def route(
        self,
        keys: AnyKeys,
        states: States,
        tasks: Tensor | int,
        whose: str = "those that are routed",
        bare: Tensor | None = None,
    ) -> Routed:
        """The modules of N samples.

        Args:
            keys: those of the samples.
            states: those of T tasks.
            tasks: [N] the samples' tasks, or one for all, which only a rule that is told them looks at.
            whose: the samples in words, for the UserError where their keys are not finite.
            bare: [N] whether a sample gets no module if it is unfamiliar; None: as `unfamiliar` says.
        """
        scores, calibration = self.scores(keys, states, whose), self.calibration(states)
        logs = None if calibration is None else calibration.log_probabilities(scores)
        selection = self.inference(self._compared(scores, logs), tasks, keys.has_image)
        strange = None if calibration is None else unfamiliar(keys, states, scores.argmax(1))
        if strange is not None and self.finds and (bare is not None or self.unfamiliar == "zero_shot"):
            selection = selection.without(strange if bare is None else strange & bare)
        return Routed(selection, self.shown(scores), None if logs is None else logs.exp(), strange)

    def compared_scores(self, keys: AnyKeys, states: States) -> Tensor:
        """What the rule compares of N samples [N, T]: scores, or logarithms of probabilities."""
        scores = self.scores(keys, states)
        calibration = self.calibration(states) if self.rule.probable else None
        return self._compared(scores, None if calibration is None else calibration.log_probabilities(scores))

    def _compared(self, scores: Tensor, logs: Tensor | None) -> Tensor:
        """What the rule is given of scores [N, T] and their log-probabilities [N, T], which a `probable` one needs."""
        if not self.rule.probable:
            return scores
        if logs is None:
            raise UserError(
                "The method weighs modules by the probabilities of tasks, and the states of its tasks keep no keys to "
                "compute them from: they were learned with another setting. Expected the method's settings of then, or "
                "a new run (`--set run_dir=...`)."
            )
        return logs

    def training(self, keys: AnyKeys, states: States) -> Selection:
        """The earlier modules beside the one that is trained, for every training sample of a stage.

        Args:
            keys: those of the stage's samples.
            states: those of the earlier tasks.
        """
        samples = len(keys.text)
        if not len(states):
            return Selection.none(samples)
        if self.router is None or not self.rule.compares:
            same = torch.zeros(1, 1).expand(samples, len(states))
            return checked(self.rule, self.rule.training(same, None), samples, len(states))
        together = self._with_own(keys, states)
        parts = []
        # In parts: the scores of a million samples for a thousand tasks would take gigabytes at once.
        for part in in_parts(keys, SAMPLES_AT_ONCE):
            earlier, own = self._of_stage(part, states, together)
            chosen = self.rule.training(earlier, own if self.rule.needs_own else None)
            parts.append(checked(self.rule, chosen, len(part.text), len(states)))
        return Selection.joined(parts)

    def _with_own(self, keys: AnyKeys, states: States) -> States | None:
        """The states of the earlier tasks and the stage's own, from its samples' keys; None where it is not needed."""
        if self.router is None or not self.rule.compares or not len(states):
            return None
        if not (self.rule.needs_own or self.rule.probable or self.router.joint):
            return None
        return States([*states, self.observe(keys)])

    def _of_stage(self, keys: Keys, states: States, together: States | None) -> tuple[Tensor, Tensor | None]:
        """The scores [N, t-1] to the earlier tasks and [N] to the stage's own, as the rule compares them."""
        if together is None:
            return self.scores(keys, states), None
        if not (self.rule.probable or (self.router is not None and self.router.joint)):
            own = States([together[-1]])
            return self.scores(keys, states), self.scores(keys, own)[:, 0]
        compared = self.compared_scores(keys, together)
        return compared[:, :-1], compared[:, -1]

    def inference(self, scores: Tensor, tasks: Tensor | int, has_image: Tensor) -> Selection:
        """The modules of N samples, given what the rule compares [N, T], tasks [N] (or one) and `has_image` [N]."""
        if not isinstance(tasks, Tensor):
            tasks = torch.full((len(scores),), tasks, dtype=torch.long)
        modules = scores.shape[1]
        answer = self.rule.inference(scores, tasks)
        chosen = checked(self.rule, answer, len(scores), modules, self.rule.most(modules))
        return chosen.without(~has_image.bool()) if self.skip_text else chosen

    @property
    def can_be_told(self) -> bool:
        """Whether modules are chosen by scores of which one can be told to be the task's own."""
        return self.finds

    def told(self, routed: Routed, states: States, task: int, has_image: Tensor) -> Selection:
        """The modules that N routed samples of one task would get had it been told, see `own_first`.

        A sample whose own task ranked first keeps its modules, and one that resembles no task gets some after all.
        """
        calibration = self.calibration(states) if self.rule.probable else None
        logs = None if calibration is None else calibration.log_probabilities(routed.scores)
        compared = self._compared(routed.scores, logs)
        elsewhere = compared.argmax(1) != task
        if routed.unfamiliar is not None and self.unfamiliar == "zero_shot":
            elsewhere = elsewhere | routed.unfamiliar.to(elsewhere.device)
        rows = elsewhere.nonzero()[:, 0]
        if not len(rows):
            return routed.selection
        return routed.selection.replaced(rows, self.inference(own_first(compared[rows], task), task, has_image[rows]))


def own_first(scores: Tensor, task: int) -> Tensor:
    """Scores [N, T] with which samples of a task rank it first: its score and the best one change places.

    So everything that a rule makes of scores, a gate or weights, is what it is for a sample that was routed as clearly
    to its own task, and probabilities add up to what they did. Rows where the task ranks first stay as they are. In
    the others it gets the next larger number than the best score, because several tasks may have that one.
    """
    best, first = scores.max(1)
    rows = (first != task).nonzero()[:, 0]
    changed = scores.clone()
    changed[rows, first[rows]] = scores[rows, task]
    changed[rows, task] = torch.nextafter(best[rows], torch.full_like(best[rows], torch.inf))
    return changed


def _calibration(router: Router) -> str:
    return f"calibration of {router.label}"


def routing_of(method: DeclaresRouting) -> Routing:
    """The routing that a method declares by names, with its options; UserError where its rule does not work."""
    router = None if method.router is None else make_router(method.router, method.options)
    rule = make_rule(method.rule, method.options)
    try_rule(rule)
    return Routing(
        router,
        rule,
        method.skips_text,
        getattr(method.options, "unfamiliar", "answer"),
        getattr(method.options, "keys_per_task", PER_TASK),
    )
