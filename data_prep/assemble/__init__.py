"""Assembles an ordinary Hugging Face checkpoint from a vision tower, a language model and a projector."""
