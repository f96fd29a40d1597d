"""The former place of `pipeline.adapter.answering`: registered MLflow models import its names from here."""

from pipeline.adapter.answering import Answerer, Question, read_image

__all__ = ["Answerer", "Question", "read_image"]
