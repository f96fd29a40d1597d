"""Prompt sets as tokens of the vocabulary: an ordinary checkpoint in which each set is a run of special tokens."""
