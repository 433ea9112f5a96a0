"""An exported folder is checked here before anything in it is parsed.

Threat: a folder from a stranger. Every name must be one that an export writes, every file a plain
one with a single name (no link of either sort), of a bounded size and of the sha256 in the
manifest, and the ONNX file may name no other file than its own data file.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from pydantic import ValidationError

from gptopt.config_classifier import labels_of, model_config_of, says_next
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import MANIFEST, read_json, verify_file, verify_manifest
from gptopt.runtime.client_files import refuse_hostile
from gptopt.runtime.graph import check_graph
from gptopt.runtime.variants import MODEL_FILE, choose
from gptopt.tokenizer import Tokenizer

KIND = "edge"

_MIB = 2**20
_FOLDERS = ("onnx", "samples", "mobile")
_FOR_ONE = ("onnx/", "mobile/")  # files that only one precision, or only a phone, reads
# Names an export may write -> the largest size of each in bytes.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(config|generation_config|genai_config|tokenizer_config)\.json"), 16 * _MIB),
    (re.compile(r"(special_tokens_map|report|manifest)\.json"), 16 * _MIB),
    (re.compile(r"README\.md|chat_template\.jinja"), 16 * _MIB),
    (re.compile(r"tokenizer\.json"), 256 * _MIB),
    (re.compile(r"onnx/model[A-Za-z0-9_]{0,32}\.onnx"), 2**31),  # protobuf ends at 2 GiB
    (re.compile(r"onnx/model[A-Za-z0-9_]{0,32}\.onnx_data"), 2**38),
    (re.compile(r"onnx/[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.onnx_adapter"), 2**31),
    # Pictures and programs for people; nothing here opens them but to hash their bytes.
    (re.compile(r"front_[A-Za-z0-9-]{1,32}\.svg"), _MIB),
    (re.compile(r"samples/(run\.(py|mjs|cpp)|index\.html|Generate\.(kt|swift))"), _MIB),
    # For phones, which have their own runtime.
    (re.compile(r"mobile/model[A-Za-z0-9_]{0,32}\.ort"), 2**31),
    (re.compile(r"mobile/required_operators_and_types\.config"), _MIB),
)


class EdgeConfig(TypedDict):
    """What the runtime knows of a model: its sizes, and the ids that end a text."""

    n_layer: int
    kv_heads: int
    head_size: int
    vocab_size: int
    tokenizer_size: int
    block_size: int
    causal: bool  # predicts next tokens, and so has a cache
    labels: list[str] | None  # of a model that labels text
    multi_label: bool
    eos_ids: list[int]


def is_edge_folder(folder: Path) -> bool:
    """Whether a folder calls itself an exported one. Says nothing about its integrity."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _limit(MANIFEST):
            return False
        return read_json(path).get("kind") == KIND
    except (OSError, UserError):
        return False


def verify_folder(folder: Path, precision: str | None = None) -> None:
    """Check names, kinds, sizes and sha256 of everything in an exported folder.

    With a precision ("auto" for the first), the ONNX files of the others are not read: gigabytes
    that nobody opens.

    Raises:
        UserError: there is no such folder, or it is not an exported one, or has no such precision.
        CheckFailed: something in it is not what the export wrote.
    """
    if precision is not None:
        with verified(folder, precision):
            return
    _check_place(folder)
    verify_manifest(folder, KIND)
    refuse_hostile(folder)


@contextlib.contextmanager
def verified(folder: Path, precision: str) -> Iterator[None]:
    """`verify_folder` of one precision, in whose block the graph may be opened.

    The weights beside the graph are numbers that nothing parses: they are hashed while the block
    runs. All else is checked before it begins.

    Raises:
        UserError, CheckFailed: as verify_folder; of the weights, when the block ends.
    """
    _check_place(folder)
    listed = verify_manifest(folder, KIND, unread=lambda name: name.startswith(_FOR_ONE))["files"]
    refuse_hostile(folder)
    _, chosen = choose(folder, precision)
    data = f"{chosen.file}_data"
    if chosen.file in listed:
        verify_file(folder, chosen.file, listed[chosen.file])
    if data not in listed:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(verify_file, folder, data, listed[data])
        try:
            yield
        finally:  # what onnxruntime says of broken weights is no help
            weights.result()


def _check_place(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder that gptopt export wrote")
    if not os.path.lexists(folder / MANIFEST):
        raise UserError(
            f"{folder}: holds no {MANIFEST}, so it is not an exported folder; gptopt export "
            f"writes one"
        )
    check_names(folder)


def check_names(folder: Path) -> None:
    """Refuse unknown names, links, and files that are not plain or too large, reading nothing."""
    for root, folders, names in os.walk(folder):
        for name in sorted(folders + names):
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if relative in _FOLDERS and stat.S_ISDIR(status.st_mode):
                continue
            if (limit := _limit(relative)) == 0:
                raise CheckFailed(
                    f"{folder}: {relative!r} has no place in an exported folder; remove it"
                )
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise CheckFailed(
                    f"{path}: is not a plain file with one name; copy files into the folder, do "
                    f"not link them"
                )
            if status.st_size > limit:
                raise CheckFailed(f"{path}: has {status.st_size} bytes, at most {limit} expected")


def file_marks(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes when a file of a folder is written to or replaced, links not followed.

    Taken before a folder is checked and after it was read, it shows that both saw the same files.
    """
    marks: dict[str, tuple[int, ...]] = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            status = (Path(root) / name).lstat()
            marks[(Path(root) / name).relative_to(folder).as_posix()] = (
                status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                status.st_ctime_ns,
            )  # fmt: skip
    return marks


def _limit(relative: str) -> int:
    return next((limit for names, limit in _LIMITS if names.fullmatch(relative)), 0)


def model_file(folder: Path, name: str = MODEL_FILE) -> Path:
    """The checked path of one of the folder's ONNX files."""
    path = folder / name
    if not path.is_file():
        raise CheckFailed(f"{path}: missing; export the model again")
    check_graph(path)
    return path


def load_tokenizer(folder: Path, size: int) -> Tokenizer | None:
    """The folder's tokenizer, of exactly `size` ids; None where it was exported without one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size != size:
        raise CheckFailed(
            f"{folder / 'tokenizer.json'}: has {tokenizer.size} ids, config.json says {size}; "
            f"copy the folder again"
        )
    return tokenizer


def load_config(folder: Path) -> EdgeConfig:
    """Sizes from config.json, ids that end a text from generation_config.json.

    Raises:
        UserError: a file is missing or malformed, or a size is impossible.
    """
    path = folder / "config.json"
    sizes = read_json(path).get("gptopt")
    if not isinstance(sizes, dict):
        raise UserError(f"{path}: has no 'gptopt' object, so gptopt did not export this folder")
    sizes = dict(sizes)
    tokenizer_size = sizes.pop("tokenizer_size", None)
    try:
        model = model_config_of(sizes)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: gptopt.{key}: {first['msg']}; export the model again") from None
    vocab_size = model.vocab_size
    if vocab_size is None or type(tokenizer_size) is not int:
        raise UserError(f"{path}: gptopt lacks vocab_size or tokenizer_size; export again")
    if not 0 < tokenizer_size <= vocab_size:
        raise UserError(
            f"{path}: tokenizer_size={tokenizer_size} does not fit vocab_size={vocab_size}"
        )
    return EdgeConfig(
        n_layer=model.n_layer,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        vocab_size=vocab_size,
        tokenizer_size=tokenizer_size,
        block_size=model.block_size,
        causal=says_next(model),
        labels=labels_of(model),
        multi_label=getattr(model, "multi_label", False),
        eos_ids=end_ids(folder),
    )


def end_ids(folder: Path) -> list[int]:
    """The end-of-text ids named in a folder's generation_config.json; none where it has none.

    Raises:
        UserError: eos_token_id is neither an id nor a list of ids.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(id_) is not int or id_ < 0 for id_ in ids):
        raise UserError(f"{path}: eos_token_id is {found!r}, expected an id or a list of ids")
    return list(ids)
