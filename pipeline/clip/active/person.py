"""A person who says the labels: what a round asks is written into the run's folder, and read once it is filled in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.clip.active import ask_files
from pipeline.clip.active.ask_files import Question
from pipeline.clip.active.pool import Rows
from pipeline.clip.images.classes import UNLABELLED
from pipeline.clip.recipe_data import NONE_OF_THESE
from pipeline.data.shards import IndexedShards
from pipeline.errors import Interrupted
from pipeline.files.paths import command
from pipeline.runs.layout import ASK, ASK_FOLDER


@dataclass(frozen=True)
class PersonOracle:
    """Answers with what a person fills into ask.csv; for rank 0.

    An image that the person has labelled in this run, for whichever unit, is not asked for again.
    """

    run: Path
    dataset: str
    classes: tuple[str, ...]
    pool: IndexedShards
    unit: str
    round: int  # from 1
    rounds: int

    def answers(self, rows: Rows) -> list[int]:
        """The label of each row.

        Raises Interrupted, once the files to be filled in are written, where a row has no answer yet; UserError for
        answers that cannot be used. A call after either goes on with the same files.
        """
        images = [str(self.pool.ids[row]) for row in rows]
        labels = ask_files.read_labels(self.run, self.dataset, self.classes)
        open_images = tuple(image for image in images if image not in labels)
        if open_images:
            labels |= self._asked(open_images, [row for row, i in zip(rows, images, strict=True) if i not in labels])
            ask_files.keep_labels(self.run, self.dataset, labels)
        ask_files.remove_question(self.run)
        numbers = {name: number for number, name in enumerate(self.classes)} | {NONE_OF_THESE: UNLABELLED}
        return [numbers[labels[image]] for image in images]

    def _asked(self, images: tuple[str, ...], rows: Rows) -> dict[str, str]:
        """The class of each image from ask.csv, which is written where it does not ask for these images."""
        question = Question(self.unit, self.round, self.rounds, self.dataset, self.classes, images)
        if Question.read(self.run) != question:
            ask_files.write_question(self.run, question, (self._picture(row) for row in rows))
        found = ask_files.read_answers(self.run, question)
        answers = {image: answer for image, answer in zip(images, found, strict=True) if answer is not None}
        if len(answers) < len(images):
            waiting, path = len(images) - len(answers), self.run / ASK
            raise Interrupted(
                f"Round {self.round} of {self.rounds} of {self.unit} waits for the class of {waiting} of {len(images)} "
                f"images. Fill in {path} (pictures: {self.run / ASK_FOLDER}/sheet-*.jpg), or run "
                f"`{command('label', self.run)}` for a page that does; then the same command goes on."
            )
        return answers

    def _picture(self, row: int) -> Image.Image:
        picture = self.pool[row].picture()
        assert picture is not None, "every sample of a class has an image"
        return picture
