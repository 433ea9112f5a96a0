"""`gptopt evaluate --choices`: multiple-choice questions, answered by what the model finds likely.

Scored as others do, so that figures can be compared: the likeliest choice, and the likeliest one
per byte (Gao et al., "A framework for few-shot language model evaluation": acc and acc_norm).
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptopt.config import EvaluateOptions
from gptopt.errors import UserError
from gptopt.likelihood import open_likelihood
from gptopt.log import progress, say

_AT_ONCE = 64  # questions whose choices are scored together


@dataclass(frozen=True)
class Question:
    """A prompt, what may follow it, and which of these is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def evaluate_choices(options: EvaluateOptions) -> dict[str, Any]:
    """Accuracy of a model or an exported folder on a jsonl of questions.

    Returns:
        questions, accuracy (likeliest choice), accuracy_per_byte (likeliest choice per byte of
        it), standard_error (of accuracy), chance (accuracy of guessing), seconds, and device or
        provider.

    Raises:
        UserError: the model cannot be used, or a line of the file is not a question.
    """
    assert options.choices is not None
    questions = read_questions(Path(options.choices))
    model = open_likelihood(options.model, checkpoint=options.checkpoint, device=options.device)
    started = time.perf_counter()
    plain = per_byte = 0
    with progress(len(questions), "questions") as shown:
        for begin in range(0, len(questions), _AT_ONCE):
            part = questions[begin : begin + _AT_ONCE]
            scored = iter(
                model.score([model.pair(q.prompt, choice) for q in part for choice in q.choices])
            )
            for question in part:
                sums = [next(scored).log_probability for _ in question.choices]
                sizes = [len(choice.encode()) for choice in question.choices]
                plain += _best(sums) == question.answer
                rates = [value / size for value, size in zip(sums, sizes, strict=True)]
                per_byte += _best(rates) == question.answer
            shown.update(len(part), accuracy=plain / (begin + len(part)))
    count = len(questions)
    accuracy = plain / count
    result = {
        "questions": count,
        "accuracy": accuracy,
        "accuracy_per_byte": per_byte / count,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None,
        "chance": sum(1 / len(question.choices) for question in questions) / count,
        "seconds": round(time.perf_counter() - started, 3),
        **model.where,
    }
    if not options.json_output:
        say(
            f"{count:,} questions: accuracy {accuracy:.4f}, per byte {per_byte / count:.4f}, "
            f"by chance {result['chance']:.4f}"
        )
    return result


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def read_questions(path: Path) -> list[Question]:
    """The questions of a jsonl: {"prompt": text, "choices": [text, ...], "answer": index}.

    Raises:
        UserError: no such file, none in it, or a line that is none; it names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--choices {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--choices {path}: not UTF-8 at byte {error.start}") from None
    found = [
        _question(f"--choices {path}:{number}", line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"--choices {path}: holds no question; expected a JSON object per line")
    return found


def _question(where: str, line: str) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: is not JSON; expected an object with prompt, choices, answer"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}, expected an object")
    prompt, choices, answer = (value.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt is {prompt!r:.60}, expected text")
    choices = choices if isinstance(choices, list) else []
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(
            f"{where}: choices is {value.get('choices')!r:.60}, expected two or more texts"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer is {answer!r:.60}, expected a number from 0 to {len(choices) - 1}, "
            f"the place of the right choice"
        )
    return Question(prompt, tuple(choices), answer)
