"""The packages of docs/extending.md, installed outside of the repository and run on tiny models."""
