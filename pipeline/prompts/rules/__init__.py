"""Rules: which modules a sample gets, given the router's scores; each by its name in `pipeline.config.registry`."""

from pipeline.prompts.rules.base import Rule, make_rule

__all__ = ["Rule", "make_rule"]
