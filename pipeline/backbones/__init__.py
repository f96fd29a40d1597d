"""Frozen models: the multimodal models that answer, and the CLIP that computes routing keys."""
