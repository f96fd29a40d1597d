"""Modular prompts in the decoder: ModalPrompt's tasks and routing, with rows of every layer that are removed, added and
carried as in Modular Prompt Learning."""

from __future__ import annotations

from pipeline.backbones.prompt_schedule import ScheduleOptions
from pipeline.methods.modalprompt import ModalPrompt, ModalPromptOptions


class ModularOptions(ModalPromptOptions, ScheduleOptions):
    """ModalPrompt's, and the schedule of rows in the decoder's layers."""


class Modular(ModalPrompt):
    """Sets are chosen per sample as ModalPrompt chooses them; prototypes are made of the rows at the input.

    With depth 1 it is ModalPrompt; with add 1 and remove null it is a set of plain prompts per layer.
    """

    Options = ModularOptions
    part = "deep"
