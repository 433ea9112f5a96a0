"""Folders are written whole or not at all, and every kind of tampering is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import (
    read_json,
    remove_stale,
    staged_folder,
    verify_manifest,
    write_json,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "thing"
    with staged_folder(target) as staged:
        (staged / "a.txt").write_text("alpha")
        (staged / "sub").mkdir()
        (staged / "sub" / "b.bin").write_bytes(bytes(100))
        write_manifest(staged, "thing")
    return target


def test_a_written_folder_verifies(folder):
    assert set(verify_manifest(folder, "thing")["files"]) == {"a.txt", "sub/b.bin"}


def tamper_byte(folder):
    (folder / "sub" / "b.bin").write_bytes(bytes(99) + b"\1")


def tamper_size(folder):
    (folder / "a.txt").write_text("alph")


def remove(folder):
    (folder / "a.txt").unlink()


def add(folder):
    (folder / "evil.py").write_text("")


def symlink(folder):
    (folder / "a.txt").rename(folder.parent / "a.txt")
    (folder / "a.txt").symlink_to(folder.parent / "a.txt")


def hardlink(folder):
    os.link(folder / "a.txt", folder.parent / "other")


def folder_link(folder):
    (folder / "sub").rename(folder.parent / "sub")
    (folder / "sub").symlink_to(folder.parent / "sub")


def fifo(folder):
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")


def outside(name):
    def change(folder):
        manifest = read_json(folder / "manifest.json")
        manifest["files"][name] = manifest["files"].pop("a.txt")
        write_json(folder / "manifest.json", manifest)

    change.__name__ = f"named_{name!r}"
    return change


@pytest.mark.parametrize(
    "change",
    [tamper_byte, tamper_size, remove, add, symlink, hardlink, folder_link, fifo,
     outside("../a.txt"), outside("/etc/passwd"), outside("sub/../a.txt"), outside(""),
     outside("sub\\a.txt"), outside("C:a.txt")],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_tampering_is_seen(folder, change):
    change(folder)
    with pytest.raises(CheckFailed):
        verify_manifest(folder, "thing")


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gptopt.manifest.sha256_of", refuse)
    with pytest.raises(CheckFailed, match=r"a\.txt: cannot be read \(Permission denied\)"):
        verify_manifest(folder, "thing")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": "other", "files": {}}', "[" * 100000])
def test_a_foreign_manifest_is_a_user_error(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify_manifest(folder, "thing")


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "x") as staged:
        (staged / "half").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_stood_there(folder):
    with pytest.raises(ZeroDivisionError), staged_folder(folder, force=True):
        raise ZeroDivisionError
    verify_manifest(folder, "thing")


def test_an_existing_folder_needs_force(folder):
    with pytest.raises(UserError, match="--force"), staged_folder(folder):
        pass
    with staged_folder(folder, force=True) as staged:
        write_manifest(staged, "new")
    assert verify_manifest(folder, "new")["files"] == {}
    assert [path.name for path in folder.parent.iterdir()] == ["thing"]


@pytest.mark.parametrize("target", [".", "..", "/", "{here}"])
def test_the_folder_one_stands_in_is_not_replaced(target, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with (
        pytest.raises(UserError, match="cannot be replaced; choose another"),
        staged_folder(Path(target.format(here=folder)), force=True),
    ):
        pass
    verify_manifest(folder, "thing")


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
from gptopt.errors import UserError
from gptopt.manifest import staged_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with staged_folder(Path(sys.argv[1]) / "x") as staged:
        (staged / "big").write_bytes(bytes(5000))
except UserError as error:
    assert "free space" in str(error), error
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_only_a_stale_folder_that_can_be_removed(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from gptopt.manifest import staged_folder
with staged_folder(Path(sys.argv[1]) / "x") as staged:
    (staged / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=False)
    assert not (tmp_path / "x").exists()
    assert len(remove_stale(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
