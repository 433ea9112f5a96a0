"""The ONNX files of an exported folder, one per precision, and what each can do.

config.json tells it under "gptopt_edge". A folder without that key holds one file whose cache grows
and whose rows may be padded anywhere, as the first exports did.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import read_json

MODEL_FILE = "onnx/model.onnx"
AUTO = "auto"
_NAME = re.compile(r"onnx/model[A-Za-z0-9_]{0,32}\.onnx")


class EdgeFile(BaseModel):
    """What is known of one ONNX file before it is opened. Unknown facts are left aside.

    Attributes:
        file: path inside the folder.
        cache: "shared" where one buffer may be bound as past and present, written in place;
            "static" where it must be, as long as all that will be read, for present is as long as
            past; "growing" where present is a new, longer tensor.
        cache_dtype: of keys and values; none: that of the logits.
        padding: "any", or "right": a row's tokens lie at the beginning of its part of the cache.
        scores: of "all" positions, or of the "last" one only.
        tokens: how the graph itself chooses the next token, its output next_tokens, if at all. It
            is for other clients: EdgeModel draws from the scores, by options that the graph lacks
            and with the numbers that the PyTorch model draws with.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    file: str = Field(MODEL_FILE, pattern=f"^{_NAME.pattern}$")
    cache: Literal["shared", "static", "growing"] = "growing"
    cache_dtype: Literal["float32", "float16", "int8"] | None = None
    padding: Literal["any", "right"] = "any"
    scores: Literal["all", "last"] = "all"
    tokens: Literal["none", "greedy", "sample"] = "none"


def edge_files(folder: Path) -> dict[str, EdgeFile]:
    """Precision -> file, in the order in which the export wrote them.

    Raises:
        UserError: config.json is missing or malformed.
        CheckFailed: what it says of a file is impossible.
    """
    path = folder / "config.json"
    told = read_json(path).get("gptopt_edge")
    if told is None:
        return {"fp32": EdgeFile()}
    found = told.get("files") if isinstance(told, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckFailed(f"{path}: gptopt_edge.files names no file; export the model again")
    try:
        files = {name: EdgeFile.model_validate(facts) for name, facts in found.items()}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckFailed(
            f"{path}: gptopt_edge.files: {key}: {first['msg']}; export the model again"
        ) from None
    for name, file in files.items():
        if (file.cache, file.padding) == ("growing", "right"):
            raise CheckFailed(
                f"{path}: gptopt_edge.files.{name}: rows padded on the right need a shared cache; "
                f"export the model again"
            )
    return files


def choose(folder: Path, precision: str = AUTO) -> tuple[str, EdgeFile]:
    """The precision that runs, and its file: "auto" takes the first that the export wrote.

    The order is that of `gptopt export --precision`, so that whoever made the folder decides.

    Raises:
        UserError: the folder has no file of that precision.
    """
    files = edge_files(folder)
    if precision == AUTO:
        precision = next(iter(files))
    if precision not in files:
        raise UserError(
            f"{folder}: has no file of precision {precision!r}, it has {', '.join(files)}; choose "
            f"one of these, or export the model with --precision {precision}"
        )
    return precision, files[precision]
