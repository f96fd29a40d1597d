"""Continual prompt learning on frozen vision-language models.

Programs can rely on these names, which are loaded when they are first used, so that importing the package stays cheap:

* `load_adapter(path)`: an exported adapter, or a run, with its frozen models; its `ask` and `answer` take questions.
* `export(run, target)`: write a run's adapter.
* `Question`: one question for `answer`.
* `load_recipe(name, overrides)`, `run_sequence(recipe)`: read a recipe, and train and evaluate all its stages.
* `PipelineError`, and of it `UserError` and `Interrupted`: what these raise on purpose.

Stable too are the verbs and options of the command line with their exit codes and `--json` results, the fields of
recipes, and the files of run folders and adapters. Everything else may be in another place in the next version.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.adapter import export as export
    from pipeline.adapter import load_adapter as load_adapter
    from pipeline.adapter.answering import Question as Question
    from pipeline.config import load_recipe as load_recipe
    from pipeline.errors import Interrupted as Interrupted
    from pipeline.errors import PipelineError as PipelineError
    from pipeline.errors import UserError as UserError
    from pipeline.sequence import run_sequence as run_sequence

__version__ = "0.2.0"

# Where the names above are. There is no __all__: pdoc would leave out the modules of the package.
_PLACES = {
    "export": "pipeline.adapter",
    "load_adapter": "pipeline.adapter",
    "Question": "pipeline.adapter.answering",
    "load_recipe": "pipeline.config",
    "run_sequence": "pipeline.sequence",
    "Interrupted": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "UserError": "pipeline.errors",
}

# Here, because libgomp reads it when torch is loaded. By default the threads of an operation wait for each other by
# asking again and again; where anything else runs on the machine they take the processor from those they wait for, and
# a step takes ten times as long. How many threads there are, and so what they compute, stays as it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
