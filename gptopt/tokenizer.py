"""Text to token ids and back, for training and for the edge alike: one standard tokenizer.json.

Every tokenizer trained here is a Hugging Face BPE over bytes, so that any client can load it. The
kinds differ in their vocabulary only: `bpe` learns merges, `word` keeps whole words beside the 256
bytes, `char` keeps exactly the characters it was trained on. This module imports no torch.
"""

import copy
import hashlib
import json
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tokenizers

from gptopt import tokenizer_files as files
from gptopt.errors import UserError
from gptopt.tokenizer_training import END_OF_TEXT, MASK, Kind, train_backend

__all__ = ["END_OF_TEXT", "DecodeStream", "Ids", "Kind", "Tokenizer", "UnknownCharacter"]

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]

_REPLACEMENT = "\ufffd"
# Keys of a foreign tokenizer_config.json that survive a save. Everything else is dropped, above
# all auto_map, which names code to run.
_KEPT_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "unk_token",
)


class UnknownCharacter(UserError):
    """A character-level tokenizer met a character that its training text did not hold."""

    def __init__(self, character: str, index: int) -> None:
        super().__init__(
            f"character {character!r} at offset {index} is not among those the character-level "
            f"tokenizer was trained on; remove it, or train a tokenizer of --kind bpe"
        )
        self.character = character
        self.index = index


class Tokenizer:
    """A trained tokenizer: `encode` and `decode`, and the files that other programs load.

    `decode(encode(x)) == x` for every str without lone surrogates, for the kinds trained here. A
    `char` tokenizer raises UnknownCharacter where it cannot spell the text. Control tokens that
    occur in the text are encoded as the plain characters they are made of.

    Attributes:
        size: one more than the largest id.
        eos_id, bos_id, pad_id: control ids; bos and pad fall back to eos where there is none.
        mask_id: stands for a token to guess; None where there is none.
        control_ids: every id that stands for no text.
        chat_template: Jinja source, or None.
        sha256: hex sha256 of tokenizer.json as it is saved.
    """

    def __init__(self, content: bytes, settings: dict[str, Any], source: str) -> None:
        self._content = content
        self._source = source
        self._settings = {key: settings[key] for key in _KEPT_SETTINGS if key in settings}
        spec = files.parse_json(content, source)
        self._backend = files.parse_backend(content, source)
        self.size: int = files.checked_size(self._backend, spec, source)
        self.sha256: str = hashlib.sha256(content).hexdigest()
        with files.library_errors(source):
            self.chat_template: str | None = files.chat_template(settings, source)
            self._characters = files.character_ids(spec)
            self._byte_level = (spec.get("decoder") or {}).get("type") == "ByteLevel"
            self._take_control_tokens(settings, files.unknown_token(spec))
            self._backend.decode(self._backend.encode(f"{END_OF_TEXT} a\n").ids)  # it really runs

    def _take_control_tokens(self, settings: dict[str, Any], unknown: str | None) -> None:
        eos = files.token_name(settings, "eos_token", self._source) or END_OF_TEXT
        self._control_names = {
            "eos_token": eos,
            "bos_token": files.token_name(settings, "bos_token", self._source) or eos,
            "pad_token": files.token_name(settings, "pad_token", self._source) or eos,
        }
        if (mask := files.token_name(settings, "mask_token", self._source)) is not None:
            self._control_names["mask_token"] = mask
        for key, name in self._control_names.items():
            if self._backend.token_to_id(name) is None:
                raise UserError(
                    f"{self._source}: its vocabulary lacks the {key} {name!r}; name one that it "
                    f"has as {key} in tokenizer_config.json"
                )
        self.eos_id, self.bos_id, self.pad_id = (
            int(self._backend.token_to_id(self._control_names[f"{key}_token"]))
            for key in ("eos", "bos", "pad")
        )
        self.mask_id: int | None = None if mask is None else self._backend.token_to_id(mask)
        # Special here even where the file forgot to say so: only special ones are spelled out.
        special = {
            token.content for token in self._backend.get_added_tokens_decoder().values()
            if token.special
        }  # fmt: skip
        self._backend.add_special_tokens(
            [
                tokenizers.AddedToken(name, special=True, normalized=False)
                for name in sorted(set(self._control_names.values()) - special)
            ]
        )
        self._control = {
            id_: token
            for id_, token in self._backend.get_added_tokens_decoder().items()
            if token.special and token.content != unknown
        }

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: Kind = "bpe",
        vocab_size: int = 8192,
        mask_token: bool = False,
    ) -> Self:
        """Learn a vocabulary of at most `vocab_size` ids from texts, which are read once.

        With `mask_token` there is a `<mask>` among them, for masked language models.

        `char` takes every character it sees and ignores `vocab_size`; its ids follow the
        characters' order, the end-of-text token comes last. `bpe` is Sennrich et al. 2016
        (arXiv:1508.07909, algorithm 1) over bytes, with the pre-tokenisation of GPT-2.

        Raises:
            UserError: `vocab_size` cannot hold the 256 bytes and the end-of-text token.
        """
        backend = train_backend(texts, kind, vocab_size, mask_token=mask_token)
        settings = {"mask_token": MASK} if mask_token else {}
        return cls(files.dump(backend), settings, f"<trained {kind} tokenizer>")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a folder that holds tokenizer.json, or vocab.json and merges.txt, or such a file.

        tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside it are read.

        Raises:
            UserError: no such file, a malformed one, a vocabulary that is not a bijection, or a
                control token that the vocabulary lacks.
        """
        path = Path(path)
        content, source = files.read_tokenizer(path)
        return cls(content, files.read_settings(path if path.is_dir() else path.parent), source)

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and, with a template, chat_template.jinja.

        `model_max_length` (tokens) is the context of the model it is saved with.
        """
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            **self._settings,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._control_names,
        }
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        if self.chat_template is not None:
            # Inlined too: transformers.js reads the configuration only.
            settings["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_bytes(self.chat_template.encode())
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "tokenizer.json").write_bytes(self._content)
        (folder / "tokenizer_config.json").write_bytes(text.encode())

    def encode(self, text: str) -> list[int]:
        """The ids of a text. No control token is added, and none is ever parsed out of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for several texts at once, on all cores."""
        if self._characters is not None:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            files.reject_surrogates(text)
        with files.library_errors(self._source):
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            batch = [encoding.ids for encoding in encodings]
        for ids in batch:
            if found := self._control.keys() & set(ids):
                token = self._backend.id_to_token(min(found))
                raise UserError(
                    f"the text holds the control token {token!r}, which the tokenizer of "
                    f"{self._source} cannot spell as plain text; remove it from the text"
                )
        return batch

    def with_chat_template(self, source: str) -> Self:
        """The same tokenizer with another chat template."""
        other = copy.copy(self)
        other.chat_template = source
        return other

    @property
    def control_names(self) -> dict[str, str]:
        """eos_token, bos_token, pad_token and, where there is one, mask_token."""
        return dict(self._control_names)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Every id that stands for no text."""
        return tuple(sorted(self._control))

    def encode_with_control(
        self, text: str, only: Container[int] | None = None, guard: str = ""
    ) -> list[int]:
        """`encode`, but control tokens (or `only` these) are parsed out of the text.

        For text that a program wrote, such as a chat template; never for a user's. A `guard` is a
        character that keeps a control token it stands in from being one; it is left out itself.
        """
        parsed = {
            token.content: (id_, token)
            for id_, token in self._control.items()
            if only is None or id_ in only
        }
        ids, end = [], 0
        if parsed:
            for match in re.finditer(_any_of([token for _, token in parsed.values()]), text):
                assert match.lastindex is not None
                ids += self.encode(text[end : match.start()].replace(guard, ""))
                ids.append(parsed[match[match.lastindex]][0])
                end = match.end()
        return ids + self.encode(text[end:].replace(guard, ""))

    def _encode_characters(self, text: str) -> list[int]:
        # The same ids as the library's, many times faster; the library would drop what it lacks.
        assert self._characters is not None
        try:
            return [self._characters[character] for character in text]
        except KeyError:
            files.reject_surrogates(text)
            index = next(i for i, char in enumerate(text) if char not in self._characters)
            raise UnknownCharacter(text[index], index) from None

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id is negative or not below `size`.
        """
        checked: list[int] = np.asarray(ids, dtype=np.int64).tolist()
        if checked and not (min(checked) >= 0 and max(checked) < self.size):
            wrong = next(id_ for id_ in checked if not 0 <= id_ < self.size)
            raise UserError(
                f"token id {wrong} is outside this tokenizer's {self.size} ids; "
                f"use the tokenizer that the ids were made with"
            )
        with files.library_errors(self._source):
            text: str = self._backend.decode(checked, skip_special_tokens=skip_special)
        return text

    def decode_stream(self, skip_special: bool = True) -> "DecodeStream":
        """Decode ids one at a time; the pieces join to what `decode` says of all of them."""
        return DecodeStream(self, skip_special=skip_special, byte_level=self._byte_level)

    def token(self, id_: int) -> str | None:
        """The vocabulary's own spelling of an id, None where there is none."""
        token: str | None = self._backend.id_to_token(id_)
        return token

    @property
    def cuts_at_spaces(self) -> bool:
        """Whether text cut before a space encodes, part by part, to the ids of the whole."""
        if self._characters is not None:
            return True
        whole, *parts = ("The cat, 42\n\n  it's here", "The cat,", " 42", "\n\n  it's", " here")
        return self.encode(whole) == [id_ for ids in self.encode_batch(parts) for id_ in ids]


def _any_of(tokens: list[Any]) -> str:
    """A pattern of the tokens with the white space that belongs to them, the longest first."""
    return "|".join(
        ("\\s*" if token.lstrip else "")
        + f"({re.escape(token.content)})"
        + ("\\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: -len(token.content))
    )


class DecodeStream:
    """Incremental decoding that holds back a character until all of its bytes have come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, byte_level: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Other decoders look at earlier tokens (a leading space, say), so those keep all ids.
        self._forgets = byte_level
        self._ids: list[int] = []
        self._sent = 0  # characters of the ids' text given out already

    def push(self, id_: int) -> str:
        """The text that this id completes, often empty."""
        self._ids.append(id_)
        text = self._tokenizer.decode(self._ids, self._skip_special)
        # The end may be the start of a character: those come out as U+FFFD until they are whole.
        ready = len(text.rstrip(_REPLACEMENT))
        new = text[self._sent : ready]
        self._sent = max(self._sent, ready)
        if self._forgets and ready == len(text):
            self._ids, self._sent = [], 0
        return new

    def flush(self) -> str:
        """What is still held back; the stream starts afresh."""
        text = self._tokenizer.decode(self._ids, self._skip_special)[self._sent :]
        self._ids, self._sent = [], 0
        return text
