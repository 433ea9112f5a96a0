import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from gptopt.config import DataOptions, TokenizeOptions
from gptopt.data import open_dataset, prepare, tokenize
from gptopt.data.sources import PIECE_CHARACTERS
from gptopt.data.splitting import Plan
from gptopt.errors import UserError
from gptopt.tokenizer import END_OF_TEXT, Tokenizer

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
WORDS = [
    "the",
    "cat",
    "sat",
    "it's",
    "42",
    "dogs,",
    "caf\u00e9",
    "\u4e2d\u6587",
    "\U0001f600",
    "\n\n",
]


def prose(words, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def tokens_of(dataset, name="train"):
    split = dataset.split(name)
    return split.read(0, len(split)).tolist()


def text_of(dataset, name="train"):
    """The text of a split, end-of-text tokens spelled out."""
    return dataset.tokenizer.decode(tokens_of(dataset, name), skip_special=False)


def file(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="needs tinyshakespeare.txt")
def test_tiny_shakespeare_is_split_as_in_nanogpt(make):
    dataset, summary = make(SHAKESPEARE)
    text = SHAKESPEARE.read_text()
    assert summary["train_tokens"] == len(dataset.train) == 1003854
    assert summary["val_tokens"] == len(dataset.val) == 111540
    assert summary["vocab_size"] == dataset.tokenizer.size == 65 + 1
    assert dataset.tokenizer.encode("".join(sorted(set(text)))) == list(range(65))
    assert text_of(dataset) == text[:1003854]
    assert text_of(dataset, "val") == text[1003854:]


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_tokens_equal_the_encoding_of_each_part_whole(make, tmp_path, kind):
    text = prose(30_000)
    assert len(text) > 1.5 * PIECE_CHARACTERS
    dataset, summary = make(
        file(tmp_path, "a.txt", text), kind=kind, vocab_size=400, val_fraction=0.25
    )
    cut = int(len(text) * 0.75)
    assert tokens_of(dataset) == dataset.tokenizer.encode(text[:cut])
    assert tokens_of(dataset, "val") == dataset.tokenizer.encode(text[cut:])
    assert text_of(dataset) + text_of(dataset, "val") == text
    assert dataset.tokenizer.sha256 == summary["tokenizer_sha256"]
    assert summary["bytes"] == len(text.encode())


def test_a_tokenizer_that_does_not_cut_at_spaces_reads_whole_documents(make, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = {word: id_ for id_, word in enumerate(["</s>", "<unk>", "\u2581the", "\u2581cat"])}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    folder = tmp_path / "foreign"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = "the cat " * 20_000 + "the cat"
    path = file(tmp_path, "a.txt", text)
    dataset, _ = make(path, tokenizer=str(folder), val_fraction=0)
    assert tokens_of(dataset) == [2, 3] * 20_001


def test_documents_are_divided_by_end_of_text_and_never_split(make, tmp_path):
    texts = [f"document {i} \u00e9 " * (i + 1) for i in range(40)]
    for i, text in enumerate(texts):
        file(tmp_path, f"in/{i:02d}.txt", text)
    dataset, summary = make(tmp_path / "in", val_fraction=0.25)
    train, val = (text_of(dataset, name).split(END_OF_TEXT) for name in ("train", "val"))
    assert (len(train), len(val)) == (30, 10)
    assert sorted(train + val) == sorted(texts)
    assert train == sorted(train, key=texts.index)  # in order, from all over
    assert val != texts[-10:]
    assert summary["documents"] == 40
    again, _ = make(tmp_path / "in", val_fraction=0.25, out="again")
    assert again.sha256 == dataset.sha256


def test_one_jsonl_file_validates_on_its_last_documents(make, tmp_path):
    texts = [f"document {i}" for i in range(20)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    path = file(tmp_path, "a.jsonl", lines)
    dataset, _ = make(path, text_field="body", val_fraction=0.1, kind="bpe", vocab_size=270)
    assert text_of(dataset).split(END_OF_TEXT) == texts[:18]
    assert text_of(dataset, "val").split(END_OF_TEXT) == texts[18:]


@pytest.mark.parametrize(
    ("files", "documents", "fraction", "validating"),
    [
        (2, 2, 0.01, 1),
        (2, 2, 0.99, 1),
        (9, 3, 0.5, 2),
        (1, 5, 0.1, 1),
        (3, 10, 0.3, 3),
        (2, 2, 0, 0),
    ],
)
def test_at_least_one_document_validates_and_one_trains(files, documents, fraction, validating):
    plan = Plan.make(files=files, documents=documents, characters=100, fraction=fraction)
    assert plan.validates.sum() == validating
    assert plan.cut is None


def test_a_single_document_among_empty_ones_is_cut_at_its_tail(make, tmp_path):
    paths = [file(tmp_path, "a.txt", ""), file(tmp_path, "b.txt", "abcdefghij")]
    dataset, _ = make(*paths, val_fraction=0.3)
    assert (text_of(dataset), text_of(dataset, "val")) == ("abcdefg", "hij")


def test_the_vocabulary_of_words_never_sees_the_validation_text(make, tmp_path):
    text = "train " * 90 + "secret" * 90
    dataset, _ = make(file(tmp_path, "a.txt", text), kind="bpe", val_fraction=0.5)
    tokens = {dataset.tokenizer.token(id_) for id_ in range(dataset.tokenizer.size)}
    assert "train" in tokens
    assert "se" not in tokens


def test_shards_are_numbered_and_read_as_one(tmp_path):
    text = prose(500)
    corpus = prepare.Corpus([file(tmp_path, "a.txt", text)])
    index = prepare._prepare(
        corpus, DataOptions(kind="char"), None, tmp_path / "data", shard_tokens=1000
    )
    names = [entry["file"] for entry in index["splits"]["train"]]
    assert names == [f"train-{i:05d}.bin" for i in range(len(names))]
    assert len(names) > 1
    assert (
        text_of(open_dataset([str(tmp_path / "data")], DataOptions()))
        == text[: int(len(text) * 0.9)]
    )


def test_a_given_tokenizer_is_used_as_it_is(make, tmp_path):
    given = Tokenizer.train([prose(500)], vocab_size=300)
    given.chat_template = "{{ messages }}"
    given.save(tmp_path / "given")
    path = file(tmp_path, "a.txt", "unseen \u0416 text")
    dataset, summary = make(path, tokenizer=str(tmp_path / "given"), val_fraction=0, kind="bpe")
    assert summary["tokenizer_sha256"] == given.sha256
    assert dataset.tokenizer.chat_template == given.chat_template
    assert text_of(dataset) == "unseen \u0416 text"


def test_a_character_the_given_tokenizer_lacks_is_named_with_its_place(tmp_path, make):
    Tokenizer.train(["abc "], kind="char").save(tmp_path / "given")
    path = file(tmp_path, "a.txt", "abc " * PIECE_CHARACTERS + "x")
    with pytest.raises(UserError) as caught:
        make(path, tokenizer=str(tmp_path / "given"))
    assert f"{path}: character 'x' at offset {4 * PIECE_CHARACTERS} " in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_the_summary_is_the_contract_and_json_prints_nothing(make, tmp_path, capsys):
    path = file(tmp_path, "a.txt", prose(100))
    _, summary = make(path)
    keys = "out documents train_tokens val_tokens vocab_size tokenizer_sha256 bytes seconds"
    assert list(summary) == keys.split()
    json.dumps(summary)
    assert capsys.readouterr().out == ""
    tokenize(TokenizeOptions(inputs=[str(path)], out=str(tmp_path / "b"), kind="char"))
    shown = capsys.readouterr().out
    assert str(tmp_path / "b") in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no text; give a file that is not empty"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"abc\xff", "not UTF-8 at byte offset 3"),
        (b"a", "leaves nothing to train on"),
    ],
)
def test_a_corpus_that_cannot_be_used_leaves_no_folder(make, tmp_path, content, expected):
    with pytest.raises(UserError, match=expected):
        make(file(tmp_path, "a.txt", content))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_fraction_outside_its_range_is_refused():
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValidationError):
            DataOptions(val_fraction=fraction)


def test_an_existing_folder_is_replaced_only_with_force(make, tmp_path):
    old, _ = make(file(tmp_path, "a.txt", "old text, old text"))
    new = file(tmp_path, "b.txt", "new text, new text")
    with pytest.raises(UserError, match=r"exists already; .* --force"):
        make(new)
    assert open_dataset([str(old.folder)], DataOptions()).sha256 == old.sha256
    replaced, _ = make(new, force=True)
    assert replaced.sha256 != old.sha256


def test_force_replaces_nothing_but_a_data_folder(make, tmp_path):
    path = file(tmp_path, "a.txt", "text")
    precious = file(tmp_path, "data/thesis.doc", "years of work")
    with pytest.raises(UserError, match="is not a data folder"):
        make(path, force=True)
    inside = file(tmp_path, "corpus/a.txt", "text")
    with pytest.raises(UserError, match="holds the input"):
        make(inside, out="corpus", force=True)
    assert precious.read_text() == "years of work"
    assert inside.read_text() == "text"


def test_a_failure_leaves_what_stood_there(make, tmp_path, monkeypatch):
    old, _ = make(file(tmp_path, "a.txt", prose(50)))

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a.txt", force=True)
    assert open_dataset([str(old.folder)], DataOptions()).sha256 == old.sha256
    assert leftovers(tmp_path) == []


def test_input_that_changes_meanwhile_is_noticed(make, tmp_path, monkeypatch):
    path = file(tmp_path, "a.txt", prose(50))
    train = prepare._train_tokenizer

    def grow_then_train(*arguments):
        with path.open("a") as grown:
            grown.write("cat")
        return train(*arguments)

    monkeypatch.setattr(prepare, "_train_tokenizer", grow_then_train)
    with pytest.raises(UserError, match="changed while it was read"):
        make(path)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    path = file(tmp_path, "a.txt", "some text " * 20_000)
    code = f"""
        import resource, sys
        from gptopt.config import TokenizeOptions
        from gptopt.data import tokenize
        from gptopt.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            tokenize(TokenizeOptions(inputs=[{str(path)!r}], out={str(tmp_path / "data")!r},
                                     kind="char", json=True))
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "data: cannot be written (File too large); free space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "data").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="needs resource usage")
def test_a_50_megabyte_line_needs_bounded_memory(tmp_path):
    line = "the cat sat on the mat; " * 2_100_000
    path = file(tmp_path, "a.txt", line)
    code = f"""
        import resource
        from gptopt.config import TokenizeOptions
        from gptopt.data import tokenize
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = tokenize(TokenizeOptions(inputs=[{str(path)!r}], out={str(tmp_path / "data")!r},
                                        kind="char", json=True))
        assert made["train_tokens"] + made["val_tokens"] == {len(line)}
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < len(line)  # less than the text itself


def test_open_dataset_refuses_what_cannot_be_meant(make, tmp_path):
    dataset, _ = make(file(tmp_path, "a.txt", prose(60)))
    folder = str(dataset.folder)
    with pytest.raises(UserError, match="is text, and only data folders can be mixed"):
        open_dataset([folder, str(tmp_path / "a.txt")], DataOptions())
    other = Tokenizer.train(["other"], kind="char")
    with pytest.raises(UserError, match="was tokenised with another tokenizer"):
        open_dataset([folder], DataOptions(), tokenizer=other)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="was tokenised with another tokenizer"):
        open_dataset([folder], DataOptions(tokenizer=str(tmp_path / "other")))
    assert open_dataset([folder], DataOptions(), tokenizer=dataset.tokenizer).sha256
    with pytest.raises(UserError, match="is not the model's own tokenizer"):
        open_dataset(
            [str(tmp_path / "a.txt")],
            DataOptions(tokenizer=str(tmp_path / "other")),
            tokenizer=dataset.tokenizer,
        )
    with pytest.raises(UserError, match="is tokenised already"):
        make(folder, out="again")


def test_the_cache_is_used_again_for_the_same_text_and_options(tmp_path):
    path = file(tmp_path, "a.txt", prose(200))
    cache = tmp_path / "run" / "data"
    options = DataOptions(kind="char")
    first = open_dataset([str(path)], options, cache=cache)
    made = (cache / "dataset.json").stat().st_mtime_ns
    os.utime(path, (1, 1))  # touched, the same text
    path.rename(tmp_path / "moved.txt")
    second = open_dataset([str(tmp_path / "moved.txt")], options, cache=cache)
    assert second.sha256 == first.sha256
    assert (cache / "dataset.json").stat().st_mtime_ns == made


def test_the_cache_of_other_text_or_options_is_refused_and_kept(tmp_path):
    path = file(tmp_path, "a.txt", prose(200))
    cache = tmp_path / "data"
    first = open_dataset([str(path)], DataOptions(kind="char"), cache=cache)
    for other in (DataOptions(kind="bpe"), DataOptions(kind="char", val_fraction=0.2)):
        with pytest.raises(UserError, match="was tokenised from other options"):
            open_dataset([str(path)], other, cache=cache)
    path.write_text(prose(200, seed=1))
    with pytest.raises(UserError, match="was tokenised from other text"):
        open_dataset([str(path)], DataOptions(kind="char"), cache=cache)
    assert open_dataset([str(cache)], DataOptions()).sha256 == first.sha256


def test_without_a_cache_the_data_goes_with_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = file(tmp_path, "a.txt", "the cat")
    dataset = open_dataset([str(path)], DataOptions(kind="char", val_fraction=0))
    folder = dataset.folder
    assert folder.is_relative_to(tmp_path / "tmp")
    assert text_of(dataset) == "the cat"
    del dataset
    gc.collect()
    assert not folder.exists()
    path.write_text("")
    with pytest.raises(UserError):
        open_dataset([str(path)], DataOptions(kind="char"))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_mutated_indexes_and_lines_raise_user_errors_only(make, tmp_path):
    """A seeded fuzzer over dataset.json and jsonl: UserError or success, nothing else."""
    rng = random.Random(5)
    dataset, _ = make(file(tmp_path, "a.txt", prose(60)))
    index = dataset.folder / "dataset.json"
    lines = file(tmp_path, "a.jsonl", '{"text": "cat \u00e9", "id": [1, 2]}\n' * 3)
    seen = {"index": 0, "lines": 0}
    for name, path in {"index": index, "lines": lines}.items():
        content = path.read_bytes()
        for _ in range(150):
            broken = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                broken[rng.randrange(len(broken))] = rng.choice(b'\xff\x00{}[]",:0-9a\\')
            path.write_bytes(broken)
            with contextlib.suppress(UserError):
                if name == "index":
                    open_dataset([str(dataset.folder)], DataOptions())
                else:
                    list(prepare.Corpus([path]).pieces())
                seen[name] += 1
    assert 0 < seen["index"] < 150
    assert 0 < seen["lines"] < 150
