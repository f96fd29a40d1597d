"""Checkpoints for other servers: prompt sets as tokens of a vocabulary or vectors of requests, and low-rank updates."""
