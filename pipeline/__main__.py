"""`python -m pipeline`: the command line of the project."""

if __name__ == "__main__":
    from pipeline.ranks.shutdown import leave_on_signals

    leave_on_signals()  # before the imports that take seconds

    from pipeline.cli.commands import main

    main()
