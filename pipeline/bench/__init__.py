"""Measurements: variants of one thing in one process, on the same weights and samples, told as ratios."""
