"""Prompt learning for classification with a frozen CLIP or SigLIP, evaluated base-to-new and across datasets."""
