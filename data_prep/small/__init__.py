"""The projector of the recipe `small`, which joins an EfficientNet to a language model, and how it is trained."""
