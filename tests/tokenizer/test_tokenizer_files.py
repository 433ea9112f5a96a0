"""Folders that others wrote, and files that someone broke."""

import json
import os
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptopt.errors import UserError
from gptopt.tokenizer import Tokenizer

GPT2_PATTERN_TEXT = "It's 42 o'clock;\n\n  we'll see  you <|endoftext|>.\t\u00e9\u4e2d\U0001f600"


def spec_of(tokenizer, folder):
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text())


def write(folder, spec, **settings_):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if settings_:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


@pytest.fixture
def spec(trained, tmp_path):
    return spec_of(trained["bpe"], tmp_path / "spec")


@pytest.fixture(scope="session")
def unigram(text):
    """A SentencePiece-like tokenizer: a space before each text, an unknown token, </s>."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return json.loads(backend.to_str())


def test_gpt2_folder_of_vocab_and_merges(trained, spec, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    loaded = Tokenizer.load(folder)
    assert loaded.size == trained["bpe"].size
    assert loaded.eos_id == trained["bpe"].eos_id
    assert loaded.encode(GPT2_PATTERN_TEXT) == trained["bpe"].encode(GPT2_PATTERN_TEXT)
    assert loaded.decode(loaded.encode(GPT2_PATTERN_TEXT)) == GPT2_PATTERN_TEXT
    loaded.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.sha256 == loaded.sha256
    assert again.encode(GPT2_PATTERN_TEXT) == loaded.encode(GPT2_PATTERN_TEXT)


def test_vocab_and_merges_that_do_not_fit_are_refused(spec, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nxq zj\n")
    with pytest.raises(UserError, match=r"vocab\.json with merges\.txt"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_make_keeps_its_file_and_control_tokens(unigram, tmp_path):
    folder = write(tmp_path / "t5", unigram, eos_token="</s>", pad_token="<unk>", auto_map={"x": 1})
    loaded = Tokenizer.load(folder)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (1, 1, 0)
    loaded.save(tmp_path / "copy")
    same = (tmp_path / "copy" / "tokenizer.json").read_bytes()
    assert same == (folder / "tokenizer.json").read_bytes()
    written = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["eos_token"] == "</s>"
    assert "auto_map" not in written
    assert not loaded.cuts_at_spaces


def test_unknown_token_may_stand_in_encoded_text(unigram, tmp_path):
    loaded = Tokenizer.load(write(tmp_path / "t5", unigram, eos_token="</s>", unk_token="<unk>"))
    assert 0 in loaded.encode("\u0416")


def test_control_token_that_the_model_would_find_in_text_is_refused(unigram, tmp_path):
    """Some models hold their control tokens as ordinary pieces: those cannot be spelled out."""
    unigram = json.loads(json.dumps(unigram))
    unigram["model"]["vocab"][1][1] = 0.0  # the likeliest of all pieces
    loaded = Tokenizer.load(write(tmp_path / "t5", unigram, eos_token="</s>"))
    with pytest.raises(UserError, match="holds the control token '</s>'"):
        loaded.encode("cat</s>dog")


def test_control_token_that_the_file_calls_ordinary_is_still_not_parsed(spec, tmp_path):
    spec["added_tokens"][0]["special"] = False
    loaded = Tokenizer.load(write(tmp_path / "t", spec, eos_token="<|endoftext|>"))
    assert loaded.eos_id not in loaded.encode("a<|endoftext|>b")
    assert loaded.decode(loaded.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_stream_of_another_make_equals_whole_decode(unigram, data):
    loaded = Tokenizer(json.dumps(unigram).encode(), {"eos_token": "</s>"}, "unigram")
    ids = data.draw(st.lists(st.integers(0, loaded.size - 1), max_size=20))
    stream = loaded.decode_stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == loaded.decode(ids)


def test_stored_truncation_and_padding_are_not_applied(spec, trained, tmp_path):
    spec["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    loaded = Tokenizer.load(write(tmp_path / "t", spec))
    assert loaded.encode("The cat sat on the mat") == trained["bpe"].encode(
        "The cat sat on the mat"
    )


def test_stored_dropout_does_not_make_encoding_random(spec, trained, tmp_path):
    spec["model"]["dropout"] = 0.9
    loaded = Tokenizer.load(write(tmp_path / "t", spec))
    assert all(loaded.encode(" the cat") == trained["bpe"].encode(" the cat") for _ in range(5))


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ("inlined", None, "inlined"),
        (None, "own file \u2713\n", "own file \u2713\n"),
        ("inlined", "own file", "own file"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], None, "d"),
        (None, None, None),
    ],
)
def test_chat_template_is_kept(spec, tmp_path, config, file, expected):
    folder = write(tmp_path / "chat", spec, chat_template=config)
    if file is not None:
        (folder / "chat_template.jinja").write_bytes(file.encode())
    loaded = Tokenizer.load(folder)
    assert loaded.chat_template == expected
    loaded.save(tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert written.get("chat_template") == expected
    assert (tmp_path / "copy" / "chat_template.jinja").exists() == (expected is not None)
    assert Tokenizer.load(tmp_path / "copy").chat_template == expected


def test_special_tokens_map_is_read_and_the_configuration_counts_more(spec, tmp_path):
    folder = write(tmp_path / "map", spec)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "!"}}')
    assert Tokenizer.load(folder).eos_id == spec["model"]["vocab"]["!"]
    (folder / "tokenizer_config.json").write_text('{"eos_token": "?"}')
    assert Tokenizer.load(folder).eos_id == spec["model"]["vocab"]["?"]


def broken(change):
    return pytest.param(change, id=change.__name__)


def id_twice(spec):
    spec["model"]["vocab"]["a"] = spec["model"]["vocab"]["b"]
    return "stands for both"


def control_token_moved(spec):
    spec["added_tokens"][0]["id"] = 5
    return "in added_tokens but 0 in use"


def huge_id(spec):
    spec["model"]["vocab"]["zq"] = 2**31
    return f"id {2**31} is not below"


def no_end_of_text(spec):
    spec["added_tokens"] = []
    del spec["model"]["vocab"]["<|endoftext|>"]
    return "lacks the eos_token '<|endoftext|>'"


def panic(spec):
    spec["model"]["continuing_subword_prefix"] = "\u00e9##"
    return "the tokenizer cannot be used"


def merge_of_nothing(spec):
    spec["model"]["merges"].append(["zz", "qq"])
    return "the tokenizer cannot be used"


def unknown_model(spec):
    spec["model"]["type"] = "Markov"
    return "the tokenizer cannot be used"


def no_model(spec):
    del spec["model"]
    return "the tokenizer cannot be used"


def empty_vocabulary(spec):
    spec["model"].update(vocab={}, merges=[])
    spec["added_tokens"] = []
    return "vocabulary is empty"


@pytest.mark.parametrize(
    "change",
    [
        broken(id_twice),
        broken(control_token_moved),
        broken(huge_id),
        broken(no_end_of_text),
        broken(panic),
        broken(merge_of_nothing),
        broken(unknown_model),
        broken(no_model),
        broken(empty_vocabulary),
    ],
)
def test_a_broken_tokenizer_is_named_in_one_line(spec, tmp_path, change):
    expected = change(spec)
    folder = write(tmp_path / "broken", spec)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    message = str(caught.value)
    assert str(folder / "tokenizer.json") in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"eos_token": 5}, "gives 5 as eos_token"),
        ({"eos_token": "<gone>"}, "lacks the eos_token '<gone>'"),
        ({"pad_token": {"content": ""}}, "as pad_token"),
        ({"chat_template": 3}, "chat_template is int"),
        ({"chat_template": "a\ud800"}, "lone surrogate"),
        ({"eos_token": "\ud800"}, "the tokenizer cannot be used"),
    ],
)
def test_broken_settings_are_named(spec, tmp_path, settings_, expected):
    folder = write(tmp_path / "broken", spec, **settings_)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: (not JSON|expected a JSON object)"):
        Tokenizer.load(file)


def test_missing_tokenizer_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.json"):
        with pytest.raises(UserError, match=r"no tokenizer\.json, and no vocab\.json"):
            Tokenizer.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_chat_template_that_is_not_utf8_is_named(spec, tmp_path):
    folder = write(tmp_path / "chat", spec)
    (folder / "chat_template.jinja").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 at byte 3"):
        Tokenizer.load(folder)


def test_mutated_files_load_or_raise_user_errors(trained):
    """A seeded fuzzer over structure and bytes: nothing but UserError may come out."""
    rng = random.Random(7)
    small = {
        kind: Tokenizer.train(["cat dog \u00e9"], kind=kind, vocab_size=260)
        for kind in ("bpe", "char")
    }
    junk = [None, -1, 2**40, 0.5, "", "\u00e9", [], {}, True, ["a", "b"], {"type": "ByteLevel"}]

    def mutate(node):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            mutate(node[key])
        elif rng.random() < 0.3:
            del node[key]
        else:
            node[key] = rng.choice(junk)

    refused = []
    for turn in range(300):
        spec = json.loads(small["char" if turn % 2 else "bpe"]._content)
        mutate(spec)
        content = bytearray(json.dumps(spec).encode())
        if turn % 3 == 0:
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            loaded = Tokenizer(bytes(content), {}, "fuzzed")
            loaded.decode(loaded.encode("cat"))
        except UserError as error:
            refused.append(str(error))
    assert 30 < len(refused) < 300
    assert not any("\n" in message for message in refused)
