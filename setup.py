"""Which packages the wheel has; everything else about the project is in pyproject.toml.

`ds_configs/` and `slurm/` lie at the top of the repository and are installed inside `pipeline`: recipes name files of
the first, and the scripts of the second are copied from there. pyproject.toml can map a folder to a package, but not
together with a search for the other packages.
"""

from setuptools import find_namespace_packages, setup

INSIDE = {"pipeline.ds_configs": "ds_configs", "pipeline.slurm": "slurm"}

setup(
    packages=[*find_namespace_packages(include=["pipeline*", "data_prep*"]), *INSIDE],
    package_dir=dict(INSIDE),
)
