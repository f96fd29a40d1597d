"""Routers: how the task of a sample is recognised from its keys; each by its name in `pipeline.config.registry`."""

from pipeline.prompts.routers.base import Router, State, States, make_router

__all__ = ["Router", "State", "States", "make_router"]
