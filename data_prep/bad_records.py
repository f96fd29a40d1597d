"""Records of a source that cannot be used, and the limit on how many of them a preparation leaves out."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class BadRecord:
    """A record, named by its file and its place there, and the reason why it cannot be used."""

    file: str
    record: str
    reason: str

    def sentence(self) -> str:
        """The error message."""
        return f"{self.file}, {self.record}: {self.reason}"

    def as_json(self) -> dict[str, str]:
        """Its entry in dataset.json."""
        return asdict(self)


class Tolerance:
    """The number of bad records, over all tasks and splits, that may be left out, and those that were."""

    def __init__(self, limit: int, may_grow: bool = True) -> None:
        """With `may_grow` false, `--skip-bad` does not apply to these records, so no message advises to raise it."""
        self.limit, self.may_grow = limit, may_grow
        self.skipped: list[BadRecord] = []

    def skip(self, record: BadRecord) -> None:
        """Leave a record out; raises UserError that names it when the limit is reached."""
        if len(self.skipped) >= self.limit and not self.may_grow:
            raise UserError(record.sentence())
        if len(self.skipped) >= self.limit:
            before = f" besides the {len(self.skipped)} before it" if self.skipped else ""
            raise UserError(
                f"{record.sentence()} Or leave it out{before}: `--skip-bad {len(self.skipped) + 1}` allows that."
            )
        self.skipped.append(record)
