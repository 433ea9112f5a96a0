"""Folders from strangers: whatever was changed, added, linked or declared is refused, unparsed."""

import json
import os
import shutil
import sys

import pytest

from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import sha256_of, write_manifest
from gptopt.runtime import EdgeModel
from gptopt.runtime.folder import is_edge_folder, verify_folder
from gptopt.tokenizer import Tokenizer

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "onnx/model.onnx", "onnx/model.onnx_data"]  # fmt: skip
posix = pytest.mark.skipif(sys.platform == "win32", reason="links and fifos of POSIX")


@pytest.fixture
def nothing_is_parsed(monkeypatch):
    """Fail the test where a folder is parsed although it must be refused before."""
    import onnxruntime

    def forbidden(*args, **kwargs):
        raise AssertionError("parsed before it was checked")

    monkeypatch.setattr(Tokenizer, "load", forbidden)
    monkeypatch.setattr(onnxruntime, "InferenceSession", forbidden)
    monkeypatch.setattr("gptopt.runtime.edge.load_config", forbidden)
    monkeypatch.setattr("gptopt.runtime.folder.check_graph", forbidden)


def refused(folder, message, error=CheckFailed):
    with pytest.raises(error, match=message) as caught:
        EdgeModel(folder, threads=1).tokenizer  # noqa: B018 - it is read when asked for
    assert "\n" not in str(caught.value)


def test_an_untouched_folder_is_accepted(folder):
    verify_folder(folder)
    assert is_edge_folder(folder)
    assert EdgeModel(folder, threads=1).provider == "cpu"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_a_changed_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, rf"{name.split('/')[-1]}: its sha256 differs from manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_a_missing_or_cut_file_is_found(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    refused(folder, r"bytes, manifest.json says")
    (folder / name).unlink()
    refused(folder, r"listed in manifest.json but missing")


@pytest.mark.parametrize(
    "name",
    [
        "evil.py",
        "rng.pt",
        "onnx/libcustom.so",
        "onnx/other.onnx_data",
        "config.json.bak",
        ".hidden",
        "onnx/Model.onnx",
        "onnx/model.onnx2",
        "sub/config.json",
        "onnx/onnx/model.onnx",
    ],
)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_unknown_names_are_refused_even_where_the_manifest_lists_them(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    write_manifest(folder, "edge")
    refused(folder, "has no place in an exported folder; remove it")


@pytest.mark.usefixtures("nothing_is_parsed")
def test_a_name_with_a_newline_is_told_in_one_line(folder):
    if sys.platform == "win32":
        pytest.skip("Windows has no such names")
    (folder / "config.json\nx").write_bytes(b"{}")
    refused(folder, "no place in an exported folder")


@pytest.mark.parametrize("name", ["README.md", "onnx/model_q4.onnx", "chat_template.jinja"])
@pytest.mark.usefixtures("nothing_is_parsed")
def test_known_names_must_be_listed(folder, name):
    (folder / name).write_bytes(b"x")
    refused(folder, "is not listed in manifest.json")


@posix
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_links_are_refused(folder, tmp_path, name):
    target = tmp_path / "elsewhere"
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)
    refused(folder, "is not a plain file with one name; copy files")
    (folder / name).unlink()
    os.link(target, folder / name)
    refused(folder, "is not a plain file with one name; copy files")


@posix
@pytest.mark.usefixtures("nothing_is_parsed")
def test_a_linked_folder_is_refused(folder, tmp_path):
    shutil.move(folder / "onnx", tmp_path / "onnx")
    (folder / "onnx").symlink_to(tmp_path / "onnx")
    refused(folder, "'onnx' has no place|not a plain file")


@posix
@pytest.mark.parametrize("name", ["config.json", "README.md", "manifest.json"])
@pytest.mark.usefixtures("nothing_is_parsed")
def test_a_fifo_does_not_hang_us(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, "is not a plain file with one name")
    assert is_edge_folder(folder) == (name != "manifest.json")


@posix
@pytest.mark.usefixtures("nothing_is_parsed")
def test_an_endless_device_is_not_read(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    refused(folder, "is not a plain file with one name")
    assert not is_edge_folder(folder)


@pytest.mark.usefixtures("nothing_is_parsed")
def test_sizes_are_bounded_before_anything_is_read(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(2**28 + 1)  # sparse: takes no room on the disk
    refused(folder, "has 268435457 bytes, at most 268435456 expected")


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "onnx/../../secret", "onnx\\model.onnx", "C:x", "", ".", "a//b"],
)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_manifest_names_never_lead_outside(folder, name):
    (folder.parent / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_of(folder.parent / "secret")}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))
    refused(folder, "is not a plain name inside the folder")


@pytest.mark.parametrize("size", [10**18, -1, "many", None, 2.5])
@pytest.mark.usefixtures("nothing_is_parsed")
def test_declared_sizes_are_not_believed(folder, size):
    edit_manifest(folder, lambda m: m["files"]["onnx/model.onnx"].update(bytes=size))
    refused(folder, "bytes, manifest.json says")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[" * 200_000, "not readable as JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "expected a manifest of kind 'edge'"),
        (b'{"kind": "edge", "files": []}', "expected a manifest of kind 'edge'"),
        (b'{"kind": "checkpoint", "files": {}}', "kind 'edge', found 'checkpoint'"),
        (b'{"kind": "edge", "files": {"config.json": 5}}', "lacks bytes or sha256"),
        (b'{"kind": "edge", "files": {}}', "is not listed"),
    ],
)
@pytest.mark.usefixtures("nothing_is_parsed")
def test_malformed_manifests_are_refused(folder, content, message):
    (folder / "manifest.json").write_bytes(content)
    refused(folder, message, error=UserError)


@pytest.mark.usefixtures("nothing_is_parsed")
def test_folders_that_are_none_of_ours_are_named(tmp_path, folder):
    refused(
        tmp_path / "absent", "no such folder; give a folder that gptopt export wrote", UserError
    )
    refused(folder / "config.json", "no such folder", UserError)
    (folder / "manifest.json").unlink()
    refused(folder, "holds no manifest.json, so it is not an exported folder", UserError)


PANIC = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None,
    "model": {
        "type": "BPE", "continuing_subword_prefix": "\u00e9\u00e9\u00e9", "merges": [["a", "b"]],
        "vocab": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("content", [json.dumps(PANIC), "{}", "[]", "null", "x", '{"model": 1}'])
def test_a_tokenizer_that_breaks_its_library_is_a_users_error(folder, content, capfd):
    (folder / "tokenizer.json").write_text(content)
    write_manifest(folder, "edge")
    refused(folder, "tokenizer.json", error=UserError)


@pytest.mark.parametrize("ids", ["all", [1, "2"], -1, 1.5, True])
def test_end_of_text_ids_must_be_ids(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    write_manifest(folder, "edge")
    refused(folder, "expected an id or a list of ids", error=UserError)


@pytest.mark.parametrize("content", ["{}", '{"gptopt": 5}', "[", '{"gptopt": {"n_layer": "x"}}'])
def test_configurations_that_say_nothing_are_refused(folder, content):
    (folder / "config.json").write_text(content)
    write_manifest(folder, "edge")
    refused(folder, "config.json", error=UserError)
