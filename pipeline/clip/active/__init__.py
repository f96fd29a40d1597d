"""Active prompt learning: which images of a pool to have labelled, round by round."""
