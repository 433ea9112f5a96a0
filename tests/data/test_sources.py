import json
import logging
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.data.sources import Corpus, cut
from gptopt.errors import UserError
from gptopt.tokenizer import Tokenizer


def documents(*inputs, field="text", limit=16):
    texts = {}
    for piece in Corpus(inputs, field).pieces(limit):
        assert len(texts.get(piece.document, "")) == piece.offset
        assert 0 < len(piece.text) <= limit
        texts[piece.document] = texts.get(piece.document, "") + piece.text
    assert list(texts) == list(range(len(texts)))
    return list(texts.values())


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(*inputs, field="text"):
    with pytest.raises(UserError) as caught:
        documents(*inputs, field=field, limit=2**16)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path, caplog):
    for name in ("b.txt", "a.MD", "sub/z.py", "sub/a.rst", "C.text", "sub/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "sub/x.jsonl"}' if name.endswith("jsonl") else name)
    for name in ("x.bin", ".hidden.txt", ".git/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not this")
    with caplog.at_level(logging.INFO, "gptopt"):
        found = documents(tmp_path)
    assert found == ["C.text", "a.MD", "b.txt", "sub/a.rst", "sub/x.jsonl", "sub/z.py"]
    assert "skipped 1 files" in caplog.text


def test_a_file_given_by_name_is_always_taken(tmp_path):
    (tmp_path / ".notes").write_text("a")
    (tmp_path / "x.bin").write_text("b")
    assert documents(tmp_path / ".notes", tmp_path / "x.bin") == ["a", "b"]


def test_a_file_given_twice_counts_once(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert documents(tmp_path / "b.txt", tmp_path) == ["b", "a"]
    assert "1 files were given twice" in caplog.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfabc", "abc"),
        (b"\xef\xbb\xbf\xef\xbb\xbfabc", "\ufeffabc"),
        (b"a\r\nb\rc\n", "a\r\nb\rc\n"),
        (b"a\0b", "a\0b"),
        (b"no newline", "no newline"),
        ("\u4e2d\U0001f468\u200d\U0001f469".encode(), "\u4e2d\U0001f468\u200d\U0001f469"),
    ],
)
def test_text_is_taken_as_it_is_without_its_byte_order_mark(tmp_path, content, expected):
    (tmp_path / "a.txt").write_bytes(content)
    assert documents(tmp_path / "a.txt") == [expected]


def test_empty_documents_do_not_count(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    jsonl(tmp_path / "c.jsonl", {"text": "x"}, {"text": ""}, {"text": "y"})
    assert documents(tmp_path) == ["x", "y"]


@pytest.mark.parametrize("before", [0, 1, 5, 2**20 - 1, 2**20, 2**20 + 1])
def test_invalid_utf8_is_named_with_its_byte_offset(tmp_path, before):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * before + b"\xff" + b"more")
    assert f"{path}: not UTF-8 at byte offset {before} (0xff" in refused(path)


def test_a_character_across_two_reads_is_whole_and_a_cut_one_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * (2**20 - 1) + "\u4e2d".encode() + b"b")
    assert "".join(documents(path, limit=2**20))[-2:] == "\u4e2db"
    path.write_bytes(b"a" * (2**20 - 1) + "\u4e2d".encode()[:2])
    assert f"byte offset {2**20 - 1} (0xe4, unexpected end of data)" in refused(path)
    path.write_bytes(b"a" * (2**20 - 1) + "\u4e2d".encode()[:2] + b"b")
    assert f"byte offset {2**20 - 1} (0xe4" in refused(path)


def test_utf16_is_named_at_its_first_byte(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    assert "byte offset 0 (0xff" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"body": "x", "id": 1}', "no field 'text' (found: body, id); choose with --text-field"),
        ('{"text": 5}', "field 'text' is int, expected text"),
        ('{"text": null}', "field 'text' is NoneType"),
        ('{"text": ["x"]}', "field 'text' is list"),
        ('["x"]', "expected an object, found list"),
        ('{"text": "x"', "not JSON ("),
        ("[" * 100_000, "not JSON ("),
        ('{"text": ' + "1" * 5000 + "}", "not JSON ("),
        ('{"text": "ab\\ud800"}', r"field 'text': lone surrogate '\ud800' at offset 2"),
    ],
)
def test_a_broken_jsonl_line_is_named_with_its_number(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = refused(path)
    assert f"{path} line 3: " in message
    assert expected in message


def test_invalid_utf8_in_jsonl_is_named_with_line_and_byte_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"{path} line 2: not UTF-8 at byte offset 24 (0xff" in refused(path)


def test_jsonl_takes_a_byte_order_mark_a_field_and_no_last_newline(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'\xef\xbb\xbf{"t": "a\\n", "x": 1}\r\n{"t": "\\ud83d\\ude00"}')
    assert documents(path, field="t") == ["a\n", "\U0001f600"]


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def test_parquet_rows_are_documents(tmp_path):
    rows = [f"row {i} \u00e9" for i in range(130)]
    path = parquet(tmp_path / "a.parquet", text=rows, id=list(range(130)))
    assert documents(path) == rows


def test_parquet_errors_name_column_and_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", body=["a", None], number=[1, 2])
    assert "no column 'text' (found: body, number); choose with --text-field" in refused(path)
    assert "row 1: field 'number' is int, expected text" in refused(path, field="number")
    assert "row 2: field 'body' is NoneType" in refused(path, field="body")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_parquet_is_named(tmp_path, keep):
    path = parquet(tmp_path / "a.parquet", text=["some text"] * 300)
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} after row 0: not readable as parquet" in refused(path)


def test_damaged_parquet_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"some text {i}" for i in range(300)])
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    assert "not readable as parquet" in refused(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "run pip install 'gptopt[train]'" in refused(tmp_path / "a.parquet")


def test_missing_and_unusable_inputs_are_named(tmp_path):
    assert f"{tmp_path / 'no.txt'}: no such file or folder" in refused(tmp_path / "no.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no file with one of the suffixes .md .py" in refused(tmp_path / "empty")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "is not a plain file" in refused(tmp_path / "pipe")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    corpus = Corpus([path])

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    for read in (corpus.fingerprints, lambda: list(corpus.pieces())):
        with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
            read()


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    chunks=st.lists(st.text(alphabet="ab1 .\n\u00e9\u4e2d"), max_size=12), limit=st.integers(1, 9)
)
def test_pieces_join_to_the_text_wherever_the_chunks_end(chunks, limit):
    pieces = list(cut(chunks, limit))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert pieces == list(cut(["".join(chunks)], limit))


@pytest.fixture(scope="module")
def trained():
    text = "it's the cat 42, and  the\n\n dog's 7. \u00e9\u4e2d\t" * 20
    return [Tokenizer.train([text], kind=kind, vocab_size=300) for kind in ("bpe", "word")]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    words=st.lists(
        st.sampled_from(["the", "it's", "42", "a.b", "\u4e2d", "'s", "\x1c"]), min_size=1
    ),
    gaps=st.lists(
        st.sampled_from([" ", "  ", "\n", "\n\n ", "\t", "\r\n", "\u00a0", ""]), min_size=9
    ),
)
def test_pieces_encode_to_the_ids_of_the_whole(trained, words, gaps):
    text = "".join(word + gaps[i % len(gaps)] for i, word in enumerate(words * 3))
    pieces = list(cut([text], 24))
    for tokenizer in trained:
        ids = [id_ for part in tokenizer.encode_batch(pieces) for id_ in part]
        if all(pieces[i][0].isspace() for i in range(1, len(pieces))):
            assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_more_files_than_an_index_can_list_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gptopt.data.sources._MOST_FILES", 2)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="3 files, at most 2 can be listed; put their texts into"):
        Corpus([tmp_path])
