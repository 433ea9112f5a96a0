"""What the stages of an export decided and why: it ends in report.json."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Note:
    """One decision: at which stage, where in the model, what was done, and the reason."""

    stage: str
    where: str
    what: str
    reason: str


@dataclass(slots=True)
class Notes:
    """All notes of one export, in order, each once."""

    entries: list[Note] = field(default_factory=list)

    def add(self, stage: str, where: str, what: str, reason: str) -> None:
        """Write a decision down."""
        note = Note(stage, where, what, reason)
        if note not in self.entries:
            self.entries.append(note)

    def copy(self) -> "Notes":
        """Notes of a variant that starts where this one stands."""
        return Notes(list(self.entries))

    def as_list(self) -> list[dict[str, Any]]:
        """For report.json."""
        return [asdict(note) for note in self.entries]
