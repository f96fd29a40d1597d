"""What happens to a run when something breaks: `python -m tests.faults` tries it and prints the table."""
