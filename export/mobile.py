"""Files for phones: .ort models, which small builds of onnxruntime read, and what those need.

onnxruntime itself writes them. Each is run beside the ONNX file it was made from, which has been
proven, and must give the same numbers to the bit.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.export.targets import PORTABLE, Target
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

FOLDER = "mobile"
OPERATORS = "required_operators_and_types.config"
_LARGEST = 2**31 - 1  # a flatbuffer's
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_ROWS, _TOKENS = 2, 6

Arrays = dict[str, npt.NDArray[Any]]


def check_target(target: Target) -> None:
    """Raise UserError where a target's files do not run on a phone's processor."""
    if target.provider != PORTABLE.provider:
        raise UserError(
            f"--ort-mobile: --target {target.name} is for {target.provider}, phones run "
            f"{PORTABLE.provider}; use --target portable"
        )


def check_size(path: Path) -> None:
    """Raise UserError where a graph and its weights are more than an .ort file holds."""
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    if size > _LARGEST:
        raise UserError(
            f"--ort-mobile: {path.name} has {size:,} bytes with its weights, an .ort file holds "
            f"{_LARGEST:,}; choose a precision of fewer bits"
        )


def write_mobile(folder: Path, files: Sequence[EdgeFile]) -> dict[str, Any]:
    """Write an .ort file of each ONNX file, and the operators and types that they need.

    Returns:
        For report.json: file -> bytes and outputs compared, and the number of operators.

    Raises:
        CheckFailed: a file gives other numbers than its ONNX file.
        UserError: onnxruntime cannot write it.
    """
    (folder / FOLDER).mkdir()
    told, written = {}, []
    for file in files:
        source = folder / file.file
        path = folder / FOLDER / f"{source.stem}.ort"
        _convert(source, path)
        compared = _compare(source, path, file)
        told[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size, "compared_numbers": compared, "equal": True,
        }  # fmt: skip
        written.append(path)
    return {"files": told, "operators": _write_operators(folder / FOLDER / OPERATORS, written)}


def _options() -> Any:
    """What is the same on every machine: nothing is fused for this processor."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def _open(path: Path, options: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), options, providers=[PORTABLE.provider])


def _convert(source: Path, path: Path) -> None:
    options = _options()
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        _open(source, options)
    except Exception as error:
        raise UserError(
            f"--ort-mobile: onnxruntime cannot write {path.name} ({first_line(error)[:300]}); "
            f"choose a precision of fewer bits, or leave --ort-mobile out"
        ) from None
    logger.info("%s: %d bytes", path.name, path.stat().st_size)


def _compare(source: Path, path: Path, file: EdgeFile) -> int:
    """Let both read a prompt and go on; how many numbers were compared."""
    count = 0
    sessions = [_open(each, _options()) for each in (source, path)]
    plays = [_play(session, file.cache == "static") for session in sessions]
    for step, (wanted, found) in enumerate(zip(*plays, strict=True)):
        for name, array in wanted.items():
            if not np.array_equal(array, found[name], equal_nan=True):
                raise CheckFailed(
                    f"{path.name}: {name} of call {step} is not that of {source.name}; this is a "
                    f"fault of onnxruntime's conversion, leave --ort-mobile out"
                )
            count += array.size
    return count


def _play(session: Any, static: bool) -> list[Arrays]:
    """All outputs of a prompt and, where there is a cache, of a token behind it."""
    outputs = [value.name for value in session.get_outputs()]
    V = next(value for value in session.get_outputs() if value.name == "logits").shape[-1]
    ids = np.random.default_rng(0).integers(0, V, (_ROWS, _TOKENS + 1))
    past: Arrays = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (_ROWS, value.shape[1], _TOKENS + 1 if static else 0, value.shape[3])
            past[value.name] = np.zeros(shape, _TYPES[value.type])
    said = []
    for begin, end in ((0, _TOKENS), (_TOKENS, _TOKENS + 1))[: 2 if past else 1]:
        feed = {
            "input_ids": ids[:, begin:end],
            "attention_mask": np.ones((_ROWS, end), np.int64),
            "position_ids": np.tile(np.arange(begin, end), (_ROWS, 1)),
            **past,
        }
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        said.append(found)
    return said


def _write_operators(path: Path, models: Sequence[Path]) -> int:
    """What a reduced build of onnxruntime is made from; the number of operators."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing files to Python
        create_config_from_models(list(models), path, enable_type_reduction=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if line and not line.startswith("#")]
    names = ", ".join(model.name for model in models)
    text = "\n".join([f"# What {names} need of onnxruntime: --include_ops_by_config", *needed])
    path.write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return sum(len(_operators(line)) for line in needed)


def _operators(line: str) -> list[str]:
    """The operators of a line `domain;opset;Name{types},Name`."""
    names, depth = [""], 0
    for letter in line.split(";", 2)[2]:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    return names
