"""Texts that a model reads on its way out: to be calibrated on, and to be measured on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptopt.errors import UserError

if TYPE_CHECKING:
    from gptopt.checkpoint import LoadedModel

MIN_CALIBRATION = 512  # tokens
MIN_HELD_OUT = 256
MIN_SPLIT = 1024  # of a text that is both calibrated and measured on

_STRETCHES = 8  # of a text, of each of which the last quarter is held out


def read_ids(option: str, name: str, model: "LoadedModel", least: int) -> list[int]:
    """The token ids of a text file that an option names.

    Raises:
        UserError: it cannot be read, or has fewer than `least` tokens.
    """
    if model.tokenizer is None:
        raise UserError(f"{option} {name}: {model.folder} has no tokenizer to read it")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {name}: cannot be read as UTF-8 text ({error})") from None
    ids = model.tokenizer.encode(text)
    if len(ids) < least:
        raise UserError(
            f"{option} {name}: {len(ids)} tokens, expected at least {least}; give a longer text"
        )
    return ids


def split(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids to calibrate on, ids to measure on) of one text.

    Held out is the last quarter of each eighth of it, so that both parts come from all over.
    """
    stretch = max(len(ids) // _STRETCHES, 1)
    starts = range(0, stretch * _STRETCHES, stretch)
    used: list[int] = []
    held: list[int] = []
    for number, start in enumerate(starts, 1):
        end = len(ids) if number == _STRETCHES else start + stretch
        cut = start + (end - start) * 3 // 4
        used += ids[start:cut]
        held += ids[cut:end]
    return used, held
