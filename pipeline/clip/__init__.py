"""Prompt learning for classification with a frozen CLIP (base-to-new, cross-dataset): one house with the rest."""
