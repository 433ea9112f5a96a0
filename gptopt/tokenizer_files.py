"""Reading tokenizer files written by anyone: every malformed one ends in one line that names it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptopt.errors import UserError, first_line
from gptopt.manifest import read_json

MAX_IDS = 2**24  # no real vocabulary is near it
EACH_CHARACTER = r"[\s\S]"  # the pattern by which a character-level tokenizer is recognised
_MAX_FILE_BYTES = 2**28
_MAX_GROWTH = 256  # characters that normalizing may make of one; known tokenizers make 3


def byte_symbols() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable characters of Latin-1 stand for themselves; the other bytes follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shifted = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


@contextlib.contextmanager
def library_errors(source: str) -> Iterator[None]:
    """Turn what the tokenizers library raises about a file into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # The library panics on some malformed files, and a panic is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{source}: the tokenizer cannot be used ({first_line(error)}); restore the file"
        ) from None


def read_tokenizer(path: Path) -> tuple[bytes, str]:
    """The bytes of the tokenizer.json that `path` (a folder or a file) stands for, and its source.

    A folder that holds only vocab.json and merges.txt is read as GPT-2's byte-level BPE.
    """
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        return _read_bytes(file), str(file)
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab.is_file() and merges.is_file():
        with library_errors(f"{vocab} with merges.txt"):
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return dump(backend), str(vocab)
    raise UserError(
        f"{path}: no tokenizer.json, and no vocab.json with merges.txt, was found there; "
        f"give a folder that gptopt or transformers wrote"
    )


def dump(backend: Any) -> bytes:
    """The bytes of a tokenizer.json."""
    text: str = backend.to_str(pretty=True)
    return text.encode() + b"\n"


def _read_bytes(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise UserError(f"{file}: has {size} bytes, a tokenizer has at most {_MAX_FILE_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the file") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """What stands beside a tokenizer.json: its configuration, control tokens and chat template."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one counts
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    template = folder / "chat_template.jinja"
    if template.is_file():
        content = _read_bytes(template)
        try:
            settings["chat_template"] = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template}: not UTF-8 at byte {error.start}; restore it") from None
    return settings


def parse_json(content: bytes, source: str) -> dict[str, Any]:
    """A tokenizer.json as plain data."""
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({first_line(error)}); restore the file") from None
    if not isinstance(spec, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(spec).__name__}")
    return spec


def parse_backend(content: bytes, source: str) -> Any:
    """A tokenizer.json as the library's tokenizer, which parses no control token out of text."""
    with library_errors(source):
        check_growth(parse_json(content, source), source)
        backend = tokenizers.Tokenizer.from_buffer(content)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # merges skipped at random: for training only
        return backend


def check_growth(spec: dict[str, Any], source: str) -> None:
    """Refuse replacements that make a long text of a short one: a few in a row take all memory.

    Raises:
        UserError: a normalizer or a decoder may make more than 256 characters of one.
    """
    for kind in ("normalizer", "decoder"):
        growth, waiting = 1, [spec.get(kind)]
        while waiting:
            part = waiting.pop()
            if not isinstance(part, dict):
                continue
            for name in ("normalizers", "decoders"):
                parts = part.get(name)
                waiting += parts if isinstance(parts, list) else []
            content = part.get("content")
            if part.get("type") == "Replace" and isinstance(content, str):
                growth *= max(len(content), 1)
            if growth > _MAX_GROWTH:
                raise UserError(
                    f"{source}: its {kind} makes more than {_MAX_GROWTH} characters of one; "
                    f"restore the file"
                )


def checked_size(backend: Any, spec: dict[str, Any], source: str) -> int:
    """One more than the largest id, after a proof that ids and tokens stand one to one."""
    with library_errors(source):
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        stated = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    if not vocabulary:
        raise UserError(f"{source}: its vocabulary is empty; restore the file")
    owners: dict[int, str] = {}
    for token, id_ in vocabulary.items():
        if id_ in owners:
            raise UserError(
                f"{source}: id {id_} stands for both {owners[id_]!r} and {token!r}; "
                f"the file was changed, restore it"
            )
        owners[id_] = token
        if stated.get(token, id_) != id_:
            raise UserError(
                f"{source}: {token!r} is id {stated[token]} in added_tokens but {id_} in use; "
                f"the file was changed, restore it"
            )
    largest = max(owners)
    if largest >= MAX_IDS:
        raise UserError(f"{source}: id {largest} is not below {MAX_IDS}; restore the file")
    return largest + 1


def character_ids(spec: dict[str, Any]) -> dict[str, int] | None:
    """The id of each character, where the tokenizer is one of our character-level ones."""
    model, splitter = spec["model"], spec.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers") or [{}]
    if parts[0].get("pattern") != {"Regex": EACH_CHARACTER} or model.get("merges"):
        return None
    symbols = byte_symbols()
    return {
        bytes(symbols[symbol] for symbol in token).decode("utf-8"): id_
        for token, id_ in model["vocab"].items()
    }


def unknown_token(spec: dict[str, Any]) -> str | None:
    """The token that a model puts where it knows none; it may stand in encoded user text."""
    model = spec["model"]
    if model.get("type") == "Unigram" and model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token: str | None = model.get("unk_token")
    return token


def token_name(settings: dict[str, Any], key: str, source: str) -> str | None:
    """The text of a control token named in the settings, None where they name none."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or (isinstance(value, str) and value):
        return value
    raise UserError(
        f"{source}: tokenizer_config.json gives {value!r} as {key}, expected the token's text"
    )


def chat_template(settings: dict[str, Any], source: str) -> str | None:
    """The chat template named in the settings; of several named ones, the default."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if entry}
        value = named.get("default")
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{source}: chat_template is {type(value).__name__}, expected its text")
    reject_surrogates(value)
    return value


def reject_surrogates(text: str) -> None:
    """UserError with the offset of a lone surrogate, the one thing in a str that is not text."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"lone surrogate {text[error.start]!r} at offset {error.start} is not text; remove it"
        ) from None
