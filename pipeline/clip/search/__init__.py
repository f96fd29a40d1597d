"""The search for how many prompts each block gets, before a unit is trained (docs/clip_prompts.md)."""
