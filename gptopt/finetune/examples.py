"""Examples on their way to the model: read, encoded, held to a length, some of them held out."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptopt.config_finetune import Overlong
from gptopt.data.records import Record, has_records, read_records
from gptopt.data.sampler import shuffled
from gptopt.errors import UserError
from gptopt.log import progress

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


class Example(NamedTuple):
    """One example as tokens."""

    ids: list[int]
    learned: list[bool]  # of each token, whether the model learns to say it; empty for labels
    labels: list[float]  # of each label, 1 or 0; empty for replies


# A record becomes an example; its UserError names what is wrong, the caller adds where.
Encode = Callable[[Record], Example]


class Examples:
    """Examples side by side in memory, in the order in which they were read.

    Attributes:
        ids: int32, the tokens of all of them. learned: bool, alike.
        starts: (N + 1,) where each begins, and the end.
        labels: (N, L) float32.
        dropped: examples that were left out for their length.
    """

    def __init__(self, examples: Iterator[Example], dropped: Callable[[], int]) -> None:
        ids, learned, starts = [np.empty(0, np.int32)], [np.empty(0, np.bool_)], [0]
        labels = []
        for example in examples:
            ids.append(np.asarray(example.ids, dtype=np.int32))
            learned.append(np.asarray(example.learned, dtype=np.bool_))
            labels.append(example.labels)
            starts.append(starts[-1] + len(example.ids))
        self.ids, self.learned = np.concatenate(ids), np.concatenate(learned)
        self.starts = np.asarray(starts, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.float32)
        self.dropped = dropped()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each example."""
        return np.diff(self.starts)

    def span(self, index: int) -> slice:
        """Where an example's tokens lie."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def sha256(self) -> str:
        """The identity of what is learned from."""
        digest = hashlib.sha256()
        for part in (self.ids, self.learned, self.starts, self.labels):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class Reader:
    """Reads files of records into examples.

    Args:
        fields: columns of a parquet file that may be needed.
        encode: makes an example of a record.
        longest: tokens of an example at most.
        overlong: what becomes of longer ones.
    """

    def __init__(
        self, fields: Sequence[str], encode: Encode, longest: int, overlong: Overlong
    ) -> None:
        self._fields, self._encode, self._longest = fields, encode, longest
        self._overlong = overlong

    def read(self, names: Sequence[str]) -> Examples:
        """All examples of some files.

        Raises:
            UserError: there is no such file, or none in it; a record is malformed (the line says
                where), or an example too long.
        """
        dropped: list[str] = []
        with progress(None, "examples read") as shown:

            def counted() -> Iterator[Example]:
                for example in self._examples(names, dropped):
                    shown.update(1)
                    yield example

            examples = Examples(counted(), lambda: len(dropped))
        if dropped:
            logger.warning(
                "%d examples left out: more than %d tokens (the first is %s)",
                len(dropped), self._longest, dropped[0],
            )  # fmt: skip
        if not len(examples):
            raise UserError(f"{', '.join(names)}: holds no example; give a file that is not empty")
        return examples

    def _examples(self, names: Sequence[str], dropped: list[str]) -> Iterator[Example]:
        for name in names:
            path = Path(name)
            if not path.is_file() or not has_records(path):
                what = "not a jsonl or parquet file" if path.exists() else "no such file"
                raise UserError(f"{path}: {what}; give examples as .jsonl or .parquet")
            for where, record in read_records(path, self._fields, "an option such as --text-field"):
                try:
                    example = self._fitted(self._encode(record))
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                if example is None:
                    dropped.append(where)
                else:
                    yield example

    def _fitted(self, example: Example) -> Example | None:
        """The example within its length, or None where it is to be left out."""
        over = len(example.ids) - self._longest
        if over <= 0:
            return example
        match self._overlong:
            case "error":
                raise UserError(
                    f"{len(example.ids)} tokens, at most {self._longest} fit; shorten it, or choose"
                    f" --overlong drop, cut-start or cut-end"
                )
            case "drop":
                return None
            case "cut-start":
                kept = slice(over, None)
            case "cut-end":
                kept = slice(None, self._longest)
        cut = example._replace(ids=example.ids[kept], learned=example.learned[kept])
        # The first token is never asked for: nothing stands before it.
        return cut if not cut.learned or any(cut.learned[1:]) else None


def hold_out(count: int, fraction: float) -> tuple[Ints, Ints]:
    """(train, validation): which examples are held out, whatever the run's seed.

    At least one is, and never all, unless the fraction is 0.
    """
    if fraction == 0 or count < 2:
        return np.arange(count), np.empty(0, dtype=np.int64)
    held = min(max(1, round(fraction * count)), count - 1)
    order = shuffled(count, 0)
    return np.sort(order[held:]), np.sort(order[:held])


def text_of(record: Record, field: str, option: str) -> str:
    """A field that must be text; a user names it by the option.

    Raises:
        UserError: it is missing, or something else.
    """
    if field not in record or record[field] is None:
        found = ", ".join(sorted(key for key, value in record.items() if value is not None)[:10])
        raise UserError(f"no field {field!r} (found: {found or 'none'}); choose with {option}")
    value: Any = record[field]
    if not isinstance(value, str):
        raise UserError(
            f"field {field!r} is {type(value).__name__}, expected text; mend it, or choose another"
            f" with {option}"
        )
    return value
