"""The command line: `pipeline`, or `python -m pipeline`."""


def main() -> None:
    """Run the command line; the entry point that an installation calls."""
    from pipeline.cli.commands import main as run  # all verbs, when one is called and not with the package

    run()
