"""What code of an earlier commit left behind, and what today's code must still make of it.

`kept/` holds run folders, adapters, a registered model, prepared data, recipes and learned values on tiny random
models; `kept/origin.json` says which commit's code wrote them, `python -m tests.compat.make` is what made it. The tests
load, resume and reproduce them through entry points that users have: the verbs of the command line, `load_adapter`,
`load_recipe`, files of run folders. What needs more is in `tests.compat.inner` alone, the only file here that follows
the layout of the code.
"""
