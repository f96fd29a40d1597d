"""Records of a source that cannot be used: what is wrong with them, and how many a run leaves out."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class BadRecord:
    """One record, named by file and place in it, and the reason it cannot be used."""

    file: str
    record: str
    reason: str

    def sentence(self) -> str:
        """What a person is told about it."""
        return f"{self.file}, {self.record}: {self.reason}"

    def as_json(self) -> dict[str, str]:
        """What dataset.json keeps of it."""
        return asdict(self)


class Tolerance:
    """How many bad records of all tasks and splits together may be left out, and which have been."""

    def __init__(self, limit: int, may_grow: bool = True) -> None:
        """`may_grow` false: `--skip-bad` has nothing to do with these records, so nobody is told to raise it."""
        self.limit, self.may_grow = limit, may_grow
        self.skipped: list[BadRecord] = []

    def skip(self, record: BadRecord) -> None:
        """Leave a record out; raises UserError naming it when that is one too many."""
        if len(self.skipped) >= self.limit and not self.may_grow:
            raise UserError(record.sentence())
        if len(self.skipped) >= self.limit:
            before = f" besides the {len(self.skipped)} before it" if self.skipped else ""
            raise UserError(
                f"{record.sentence()} Or leave it out{before}: `--skip-bad {len(self.skipped) + 1}` allows that."
            )
        self.skipped.append(record)
