"""The way from INPUT to a data folder: survey, tokenizer, shards, and last of all the index.

Text is read in pieces, so memory stays bounded whatever the sizes of files, lines and documents.
Three passes: the first counts and proves every byte readable, so that mistakes show before the long
work; the second samples the training text for the tokenizer; the third tokenises on all cores.
"""

import contextlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptopt.config import DataOptions, TokenizeOptions
from gptopt.data.mixture import Mixture, parse_weights
from gptopt.data.shards import (
    INDEX,
    SHARD_TOKENS,
    SPLITS,
    Dataset,
    ShardWriter,
    dtype_for,
    read_index,
    write_index,
)
from gptopt.data.sources import PIECE_CHARACTERS, Corpus, Piece
from gptopt.data.splitting import Plan
from gptopt.errors import UserError
from gptopt.log import Progress, progress, say
from gptopt.manifest import staged_folder
from gptopt.tokenizer import Tokenizer, UnknownCharacter

_BATCH_CHARACTERS = 2**21  # tokenised at once: the library needs some 100 bytes for each
_SAMPLE_CHARACTERS = 2**25  # of training text for the tokenizer, the same share of each file
_WHOLE_CHARACTERS = 2**23  # pieces for a foreign tokenizer that does not cut at spaces


@dataclass
class _Survey:
    documents: int = 0
    characters: int = 0
    alphabet: set[str] = field(default_factory=set)


def tokenize(options: TokenizeOptions) -> dict[str, Any]:
    """Turn text into a data folder, written whole or not at all.

    Returns:
        out, documents, train_tokens, val_tokens, vocab_size, tokenizer_sha256, bytes (of the
        input), seconds.

    Raises:
        UserError: the input is missing, empty or malformed, `out` exists, or the disk is full.
    """
    started = time.monotonic()
    out = Path(options.out)
    if any(_is_data_folder(name) for name in options.inputs):
        raise UserError(f"{options.inputs[0]}: is tokenised already; give the text it came from")
    corpus = Corpus(options.inputs, options.text_field)
    _check_target(out, corpus, options)
    index = _prepare(corpus, options, _given_tokenizer(options, None), out, force=options.force)
    tokens = {name: sum(entry["tokens"] for entry in index["splits"][name]) for name in SPLITS}
    result = {
        "out": str(out),
        "documents": index["documents"],
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "vocab_size": index["vocab_size"],
        "tokenizer_sha256": index["tokenizer_sha256"],
        "bytes": corpus.bytes,
        "seconds": round(time.monotonic() - started, 3),
    }
    if not options.json_output:
        say(
            f"{out}: {tokens['train']:,} training and {tokens['val']:,} validation tokens of "
            f"{result['documents']:,} documents, vocabulary {result['vocab_size']:,}, "
            f"{corpus.bytes / max(1, sum(tokens.values())):.2f} bytes per token, "
            f"{result['seconds']:.1f} s"
        )
    return result


def open_dataset(
    inputs: list[str],
    data: DataOptions,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Path | None = None,
    verify: bool = True,
    mix: str | None = None,
) -> Dataset | Mixture:
    """Open data folders as they are, or tokenise text on the way.

    Args:
        inputs: data folders, or files and folders of text.
        data: how text is tokenised; a data folder was tokenised before, only its tokenizer counts.
        tokenizer: the tokenizer that must be used (a model's own). None: the one `data` names, or
            a new one.
        cache: data folder to write for text, or to use again where it was made of the same text
            with the same options. None: a temporary one that goes with the Dataset.
        verify: compare the sha256 of every shard, not only its size.
        mix: weights of several data folders, as `--mix` takes them.

    Raises:
        UserError: the input is missing, empty or malformed, made with another tokenizer, or
            `cache` was made from something else.
        CheckFailed: the data folder was changed.
    """
    wanted = _given_tokenizer(data, tokenizer)
    tokenised = [_is_data_folder(name) for name in inputs]
    weights = None if mix is None else parse_weights(mix, inputs)
    if any(tokenised) or weights:
        if not all(tokenised):
            raise UserError(
                f"{inputs[tokenised.index(False)]}: is text, and only data folders can be mixed; "
                f"run gptopt tokenize on it first"
            )
        dataset = (
            Dataset(Path(inputs[0]), verify=verify)
            if len(inputs) == 1
            else Mixture([Path(name) for name in inputs], weights, verify=verify)
        )
        if wanted is not None and wanted.sha256 != dataset.tokenizer.sha256:
            raise UserError(
                f"{inputs[0]}: was tokenised with another tokenizer (sha256 "
                f"{dataset.tokenizer.sha256[:12]}) than the one asked for ({wanted.sha256[:12]}); "
                f"tokenise the text again with that one"
            )
        return dataset
    corpus = Corpus(inputs, data.text_field)
    if cache is None:
        return _temporary(corpus, data, wanted)
    if cache.exists():
        _check_cache(cache, corpus, data, wanted)
        return Dataset(cache, verify=verify)
    _prepare(corpus, data, wanted, cache)
    return Dataset(cache, verify=False)


def _temporary(corpus: Corpus, data: DataOptions, tokenizer: Tokenizer | None) -> Dataset:
    folder = Path(tempfile.mkdtemp(prefix="gptopt-"))
    try:
        _prepare(corpus, data, tokenizer, folder / "data")
        dataset = Dataset(folder / "data", verify=False)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def _is_data_folder(name: str) -> bool:
    return (Path(name) / INDEX).is_file()


def _given_tokenizer(data: DataOptions, required: Tokenizer | None) -> Tokenizer | None:
    if data.tokenizer is None:
        return required
    chosen = Tokenizer.load(data.tokenizer)
    if required is not None and chosen.sha256 != required.sha256:
        raise UserError(
            f"{data.tokenizer}: is not the model's own tokenizer; leave --tokenizer out to use that"
        )
    return chosen


def _check_target(out: Path, corpus: Corpus, options: TokenizeOptions) -> None:
    """Refuse early what would be refused late, and never replace anything but a data folder."""
    if not out.exists():
        return
    if not options.force:
        raise UserError(f"{out}: exists already; choose another folder, or replace it with --force")
    if any(path.resolve().is_relative_to(out.resolve()) for path in corpus.paths):
        raise UserError(f"{out}: holds the input; choose another folder")
    if not out.is_dir() or (any(out.iterdir()) and not _is_data_folder(str(out))):
        raise UserError(f"{out}: is not a data folder, --force replaces nothing else; remove it")


def _recipe(data: DataOptions, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The options that decide what a data folder holds."""
    made: dict[str, Any] = {"kind": data.kind, "vocab_size": data.vocab_size}
    if data.mask_token:
        made["mask_token"] = True
    made = {"tokenizer": tokenizer.sha256} if tokenizer else made
    return {**made, "val_fraction": data.val_fraction, "text_field": data.text_field}


def _check_cache(
    cache: Path, corpus: Corpus, data: DataOptions, tokenizer: Tokenizer | None
) -> None:
    index = read_index(cache)
    changed = "options" if index.get("recipe") != _recipe(data, tokenizer) else None
    if changed is None and not corpus.has_fingerprints(index.get("inputs")):
        changed = "text"
    if changed:
        raise UserError(
            f"{cache}: was tokenised from other {changed}; "
            f"use the same {changed} again, or write to another folder"
        )


def _prepare(
    corpus: Corpus,
    data: DataOptions,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    force: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the data folder; its index."""
    inputs = corpus.fingerprints()
    survey = _survey(corpus, alphabet=tokenizer is None and data.kind == "char")
    plan = Plan.make(
        files=len(corpus.paths),
        documents=survey.documents,
        characters=survey.characters,
        fraction=data.val_fraction,
    )
    recipe = _recipe(data, tokenizer)
    tokenizer = tokenizer or _train_tokenizer(corpus, plan, survey, data)
    dtype = dtype_for(tokenizer.size)
    with staged_folder(out, force=force) as folder:
        tokenizer.save(folder)
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    ShardWriter(folder, name, dtype, shard_tokens=shard_tokens)
                )
                for name in SPLITS
            }
            _write_tokens(corpus, plan, survey, tokenizer, writers)
            splits = {name: writer.close() for name, writer in writers.items()}
        if not splits["train"]:
            raise UserError(
                f"{corpus.paths[0]}: val_fraction={data.val_fraction} of {survey.characters} "
                f"characters leaves nothing to train on; give more text or a smaller fraction"
            )
        index = {
            "dtype": dtype,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.size,
            "documents": survey.documents,
            "characters": survey.characters,
            "splits": splits,
            "recipe": recipe,
            "inputs": inputs,
        }
        write_index(folder, index)
    return index


def _survey(corpus: Corpus, *, alphabet: bool) -> _Survey:
    """Read everything once: counts, and each character where a vocabulary is made of them."""
    survey = _Survey()
    with progress(None, "characters read") as shown:
        for piece in corpus.pieces():
            survey.documents = piece.document + 1
            survey.characters += len(piece.text)
            if alphabet:
                survey.alphabet.update(piece.text)
            shown.update(len(piece.text))
    if not survey.characters:
        names = ", ".join(map(str, corpus.paths[:3]))
        raise UserError(f"{names}: holds no text; give a file that is not empty")
    return survey


def _train_tokenizer(corpus: Corpus, plan: Plan, survey: _Survey, data: DataOptions) -> Tokenizer:
    # Characters come from all text, so that the validation part can be spelled; bpe and word
    # never see it.
    if data.kind == "char":
        return Tokenizer.train(survey.alphabet, kind="char", mask_token=data.mask_token)
    with progress(min(_SAMPLE_CHARACTERS, survey.characters), "characters to learn") as shown:
        texts = _sample(corpus, plan, shown)
        return Tokenizer.train(
            texts, kind=data.kind, vocab_size=data.vocab_size, mask_token=data.mask_token
        )


def _sample(corpus: Corpus, plan: Plan, shown: Progress) -> Iterator[str]:
    """The first training text of each file, in equal shares."""
    share = max(1, _SAMPLE_CHARACTERS // len(corpus.paths))
    taken = dict.fromkeys(corpus.paths, 0)
    last = corpus.paths[-1]
    for split, piece in plan.assign(corpus.pieces()):
        text = piece.text[: share - taken[piece.path]] if split == "train" else ""
        if text:
            taken[piece.path] += len(text)
            shown.update(len(text))
            yield text
        if taken[last] == share:
            return


def _write_tokens(
    corpus: Corpus,
    plan: Plan,
    survey: _Survey,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
) -> None:
    """Tokenise every piece into its split, with an end-of-text token between documents."""
    limit = PIECE_CHARACTERS if tokenizer.cuts_at_spaces else _WHOLE_CHARACTERS
    last: dict[str, int] = {}
    done = 0
    with progress(survey.characters, "characters tokenised") as shown:
        for batch in _batches(plan.assign(corpus.pieces(limit))):
            for (split, piece), ids in zip(batch, _encode(tokenizer, batch), strict=True):
                if last.setdefault(split, piece.document) != piece.document:
                    writers[split].write([tokenizer.eos_id])
                last[split] = piece.document
                writers[split].write(ids)
                done += len(piece.text)
            shown.update(sum(len(piece.text) for _, piece in batch))
    if done != survey.characters:
        raise UserError(f"{corpus.paths[0]}: the input changed while it was read; run again")


def _batches(assigned: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    batch: list[tuple[str, Piece]] = []
    size = 0
    for split, piece in assigned:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[tuple[str, Piece]]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([piece.text for _, piece in batch])
    except UserError:
        for _, piece in batch:  # once more one by one, to name the place
            _encode_one(tokenizer, piece)
        raise


def _encode_one(tokenizer: Tokenizer, piece: Piece) -> None:
    try:
        tokenizer.encode(piece.text)
    except UnknownCharacter as error:
        placed = UnknownCharacter(error.character, piece.offset + error.index)
        raise UserError(f"{piece.where}: {placed}") from None
    except UserError as error:
        raise UserError(f"{piece.where}: {error}") from None
