"""`python -m pipeline.scaling` prints the tables of docs/scaling.md; see pipeline/planning/scaling.py."""

from pipeline.planning.scaling import main

if __name__ == "__main__":
    main()
