"""`python -m pipeline.scaling` prints the tables of docs/scaling.md; see pipeline/planning/scaling.py."""

import sys

from pipeline.errors import EXIT_USER, MissingExtra, require_extras
from pipeline.planning.scaling import main

if __name__ == "__main__":
    try:
        require_extras("train")  # the memory plan reads DeepSpeed's defaults
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)
    main()
