"""Records of a text and its labels, as examples; no torch, for the edge is judged on them too."""

from gptopt.data.records import Record
from gptopt.errors import UserError
from gptopt.finetune.examples import Example, text_of
from gptopt.runtime.generation import prompt_ids
from gptopt.tokenizer import Tokenizer


class LabelEncoder:
    """Makes an example of a record that has a text and a label."""

    def __init__(
        self, tokenizer: Tokenizer, labels: list[str], *, text_field: str, label_field: str,
        several: bool, parse_control: bool = False,
    ) -> None:  # fmt: skip
        self._tokenizer, self._text_field, self._label_field = tokenizer, text_field, label_field
        self._several, self._parse_control = several, parse_control
        self._numbers = {name: number for number, name in enumerate(labels)}

    def __call__(self, record: Record) -> Example:
        """Raises a UserError where the record has neither."""
        text = text_of(record, self._text_field, "--text-field")
        row = [0.0] * len(self._numbers)
        for name in names_of(record, self._label_field, several=self._several):
            if name not in self._numbers:
                known = ", ".join(list(self._numbers)[:10])
                raise UserError(f"label {name!r} is not one of {known}; mend or remove it")
            row[self._numbers[name]] = 1.0
        if self._parse_control:
            return Example(self._tokenizer.encode_with_control(text), [], row)
        return Example(prompt_ids(self._tokenizer, text), [], row)


def names_of(record: Record, field: str, *, several: bool) -> list[str]:
    """The labels of a record; numbers stand for their digits.

    Raises:
        UserError: there is none where one is needed, or it is something else.
    """
    if field not in record or record[field] is None:
        found = ", ".join(sorted(record)[:10]) or "none"
        raise UserError(f"no field {field!r} (found: {found}); choose with --label-field")
    value = record[field]
    values = list(value) if several and isinstance(value, (list, tuple)) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, (str, int)) or each == "":
            wanted = "a list of names" if several else "a name"
            hint = "; several labels need --multi-label" if isinstance(each, list) else ""
            raise UserError(f"field {field!r}: found {each!r}, expected {wanted}{hint}")
    return [str(each) for each in values]
