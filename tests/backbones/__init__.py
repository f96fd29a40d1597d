"""Tests of the model adapter and the conversation."""
