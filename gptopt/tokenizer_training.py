"""Learning a vocabulary: merges of bytes, whole words, or characters, as one standard model each.

All three are byte-level BPE models, because every client loads those. `ignore_merges` makes such a
model look a whole piece up before it merges anything: that is all that words and characters need.
"""

from collections.abc import Iterable
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptopt.errors import UserError
from gptopt.tokenizer_files import EACH_CHARACTER, byte_symbols

Kind = Literal["bpe", "char", "word"]
END_OF_TEXT = "<|endoftext|>"
MASK = "<mask>"
SMALLEST_VOCABULARY = 257  # the bytes and the end-of-text token
_MIN_FREQUENCY = 2  # what occurs once is not worth an id
_LONGEST_TOKEN = 64  # bytes: text without spaces would grow tokens without end


def train_backend(
    texts: Iterable[str], kind: Kind, vocab_size: int, *, mask_token: bool = False
) -> Any:
    """A tokenizer of the library's, trained on texts that are read once."""
    vocab_size -= mask_token
    backend = _train(texts, kind, vocab_size)
    if mask_token:
        # It takes the space before it, as the word does that it stands for; but to a
        # character-level tokenizer that space is a token of its own.
        whole = tokenizers.AddedToken(MASK, special=True, normalized=False, lstrip=kind != "char")
        backend.add_special_tokens([whole])
    return backend


def _train(texts: Iterable[str], kind: Kind, vocab_size: int) -> Any:
    if kind == "char":
        return _train_char(texts)
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size={vocab_size} is too small for kind {kind}: the 256 bytes and the "
            f"end-of-text token need {SMALLEST_VOCABULARY}"
        )
    return (_train_bpe if kind == "bpe" else _train_word)(texts, vocab_size)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Merges of bytes inside the pieces of GPT-2's pattern."""
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_word(texts: Iterable[str], vocab_size: int) -> Any:
    """The 256 bytes and the commonest whole pieces (a word with the space before it)."""
    counter = _byte_level(models.WordLevel())
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=_MIN_FREQUENCY, show_progress=False
    )
    counter.train_from_iterator(texts, trainer)
    counted = counter.get_vocab()
    symbols = sorted(byte_symbols())
    words = [word for word in sorted(counted, key=counted.__getitem__) if len(word) > 1]
    tokens = symbols + words[: vocab_size - SMALLEST_VOCABULARY]
    return _end(_byte_level(_lookup(tokens)))


def _train_char(texts: Iterable[str]) -> Any:
    """One id per character, in the characters' order, and nothing else.

    onnxruntime-genai 0.18 splits by such a pattern in ASCII text only; transformers and its
    JavaScript port do so in any text.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [whole.pre_tokenize_str(character)[0][0] for character in sorted(characters)]
    backend = _byte_level(_lookup(tokens))
    each = pre_tokenizers.Split(tokenizers.Regex(EACH_CHARACTER), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([each, whole])
    return _end(backend)


def _byte_level(model: Any) -> Any:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _lookup(tokens: list[str]) -> Any:
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    return models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)


def _end(backend: Any) -> Any:
    # Only added, never in the model's vocabulary: a look-up could find it in user text there.
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend
