"""Routing in front of an unmodified vLLM: sets are chosen here, and an engine with the exported checkpoint answers."""
