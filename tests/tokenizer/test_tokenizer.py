import hashlib
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptopt.errors import UserError
from gptopt.tokenizer import END_OF_TEXT, Tokenizer, UnknownCharacter

repeatable = settings(derandomize=True, deadline=None, max_examples=200)
NASTY = [
    "",
    "\x00",
    "\ufeff",
    "\ufffd",
    "a\r\nb\rc\n",
    " " * 50 + "\u00a0\u2028\x1c\x85",
    "e\u0301 \u00e9",
    unicodedata.normalize("NFD", "\u00c5\u1e69"),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc",
    "\uffff\U0010ffff",
    END_OF_TEXT,
    f"x{END_OF_TEXT}y <|im_start|>",
    "a" * 5000,
]


@repeatable
@given(text=st.text())
@example(text="\x00\ufeff")
def test_bpe_and_word_round_trip_any_text(trained, text):
    for kind in ("bpe", "word"):
        assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize("text", NASTY)
def test_bpe_and_word_round_trip_nasty_text(trained, text):
    for kind in ("bpe", "word"):
        ids = trained[kind].encode(text)
        assert trained[kind].decode(ids) == text
        assert trained[kind].eos_id not in ids


@repeatable
@given(data=st.data())
def test_char_round_trips_the_text_it_knows(trained, text, data):
    known = data.draw(st.text(alphabet=sorted(set(text))))
    ids = trained["char"].encode(known)
    assert len(ids) == len(known)
    assert trained["char"].decode(ids) == known


@repeatable
@given(text=st.text())
def test_char_names_the_first_character_it_cannot_spell(trained, text):
    tokenizer = trained["char"]
    known = set(tokenizer.decode(list(range(tokenizer.size - 1))))
    if set(text) <= known:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return
    with pytest.raises(UnknownCharacter) as caught:
        tokenizer.encode(text)
    error = caught.value
    assert error.character == text[error.index]
    assert error.character not in known
    assert set(text[: error.index]) <= known
    assert f"character {error.character!r} at offset {error.index} " in str(error)


def test_char_has_one_id_per_character_in_order_and_the_end_of_text(trained, text):
    tokenizer = trained["char"]
    characters = sorted(set(text))
    assert tokenizer.size == len(characters) + 1
    assert tokenizer.encode("".join(characters)) == list(range(len(characters)))
    assert tokenizer.eos_id == len(characters)


def test_word_has_one_id_for_a_known_word_and_bytes_for_others(trained):
    tokenizer = trained["word"]
    assert len(tokenizer.encode(" the cat sat")) == 3
    assert len(tokenizer.encode("zyx")) == 3
    assert len(tokenizer.encode("\u4e2e")) == 3  # the bytes of one character


def test_bpe_learns_merges(trained, text):
    assert 257 < trained["bpe"].size <= 320
    assert len(trained["bpe"].encode(text)) < len(text.encode()) / 2


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_smallest_vocabulary_is_the_bytes(kind):
    tokenizer = Tokenizer.train(["some text, some text"], kind=kind, vocab_size=257)
    assert tokenizer.size == 257
    every_byte = "".join(map(chr, range(0x2000))) + "\U0001f600\U0010ffff"
    assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_too_small_a_vocabulary_is_refused(kind):
    with pytest.raises(UserError, match=r"vocab_size=256 is too small .* need 257"):
        Tokenizer.train(["text"], kind=kind, vocab_size=256)


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_training_is_repeatable(kind, text):
    parts = [text[:100], text[100:]]
    first, second = (Tokenizer.train(iter(parts), kind=kind, vocab_size=300) for _ in range(2))
    assert first.sha256 == second.sha256


def test_control_tokens_in_text_are_only_text(trained):
    for kind in ("bpe", "word"):
        tokenizer = trained[kind]
        ids = tokenizer.encode(f"a {END_OF_TEXT}{END_OF_TEXT} b")
        assert tokenizer.eos_id not in ids
        joined = [*ids, tokenizer.eos_id]
        assert tokenizer.decode(joined) == f"a {END_OF_TEXT}{END_OF_TEXT} b"
        assert tokenizer.decode(joined, skip_special=False).endswith(f" b{END_OF_TEXT}")


def test_control_token_in_training_text_does_not_become_reachable():
    text = f"{END_OF_TEXT} word {END_OF_TEXT} word\n" * 20
    for kind in ("bpe", "word", "char"):
        tokenizer = Tokenizer.train([text], kind=kind, vocab_size=300)
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogate_is_refused_with_its_offset(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate '\\ud800' at offset 2"):
        tokenizer.encode("ca\ud800t")


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, wrong):
    with pytest.raises(UserError, match=f"token id {wrong} is outside this tokenizer's"):
        tokenizer.decode([1, wrong])


def test_decode_takes_arrays_and_nothing(tokenizer):
    ids = tokenizer.encode("cat")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "cat"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


def test_encode_batch_equals_encode(tokenizer, text):
    parts = text.splitlines(keepends=True)
    assert tokenizer.encode_batch(parts) == [tokenizer.encode(part) for part in parts]


@repeatable
@given(data=st.data())
def test_stream_equals_whole_decode_for_any_ids(tokenizer, data):
    """Ids as a model draws them: broken UTF-8 and control tokens included."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=40))
    for skip in (True, False):
        stream = tokenizer.decode_stream(skip)
        pieces = [stream.push(id_) for id_ in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip)


def test_stream_holds_back_half_characters(trained):
    tokenizer = trained["word"]
    stream = tokenizer.decode_stream()
    pieces = [stream.push(id_) for id_ in tokenizer.encode("x\u4e2ey")]
    assert pieces == ["x", "", "", "\u4e2e", "y"]
    stream.push(tokenizer.encode("\u4e2e")[0])
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("x")[0]) == "x"  # a flushed stream starts afresh


def test_text_cut_before_spaces_encodes_part_by_part(tokenizer):
    assert tokenizer.cuts_at_spaces


def test_save_and_load_keep_every_byte(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path / "a", model_max_length=64)
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    content = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == content
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.size, loaded.eos_id) == (tokenizer.size, tokenizer.eos_id)
    settings_ = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert settings_["model_max_length"] == 64
    by_file = Tokenizer.load(tmp_path / "a" / "tokenizer.json")
    assert by_file.sha256 == tokenizer.sha256


def test_transformers_loads_the_folder_with_the_same_ids(tokenizer, text, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    try:
        tokenizer.save(tmp_path, model_max_length=128)
    finally:
        tokenizer.chat_template = None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert len(theirs) == tokenizer.size
    assert theirs.model_max_length == 128
    for name in ("eos", "bos", "pad"):
        assert getattr(theirs, f"{name}_token_id") == getattr(tokenizer, f"{name}_id")
    ended = [*tokenizer.encode("cat"), tokenizer.eos_id]
    assert theirs.decode(ended, skip_special_tokens=True) == tokenizer.decode(ended)
    said = theirs.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    assert said == "cat\n"


def test_tokenizer_and_data_import_neither_torch_nor_pyarrow():
    code = (
        "import sys, gptopt.tokenizer, gptopt.data; "
        "sys.exit(bool({'torch', 'pyarrow', 'onnx', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
