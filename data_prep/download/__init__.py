"""Downloads of the published benchmarks' files: what each task needs, from where, and what a person has to fetch."""
