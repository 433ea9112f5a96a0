"""Folders that are written whole or not at all, and that can be checked before they are used.

A folder is staged beside its target, synced to disk, and renamed into place, so that a crash, a
full disk or a kill never leaves a half-written one. `manifest.json` lists every file's sha256.
This module is part of the edge: it imports no torch and nothing that only POSIX has.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptopt.errors import CheckFailed, UserError

Entries = dict[str, dict[str, Any]]  # file name -> its bytes and sha256

MANIFEST = "manifest.json"
_STAGING_PREFIX = ".tmp-"
_MAX_JSON_BYTES = 2**26  # Python's objects take some ten times as much


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError naming the file where it is missing or malformed."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, _MAX_JSON_BYTES))
        if size > _MAX_JSON_BYTES:
            raise UserError(f"{path}: has more than {_MAX_JSON_BYTES} bytes; restore the file")
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with a final newline, replacing the file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: readers see the old content or the new, never a part."""
    staged = path.with_name(f"{_STAGING_PREFIX}{path.name}-{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from None


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(
    folder: Path, kind: str, *, known: Entries | None = None, free: Collection[str] = ()
) -> None:
    """List every file below `folder` in its manifest.json. `kind` says what the folder is.

    Files in `known` are not read: those that wrote them said what is in them. Those in `free` may
    change later, as what people alone read does.
    """
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
    listed = [name for name in names if name not in free]
    files = {name: (known or {}).get(name) or entry_of(folder / name) for name in listed}
    loose = {"free": sorted(free)} if free else {}
    write_json(folder / MANIFEST, {"format": 1, "kind": kind, "files": files, **loose})


def verify_manifest(
    folder: Path,
    kind: str,
    *,
    strict: bool = True,
    unread: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Check a folder against its manifest and return the manifest.

    Every listed file must be a regular file inside the folder (no link of either sort), of the
    listed size and sha256. With `strict` no unlisted file may lie beside them, but those that the
    manifest calls free. The sha256 of files whose name is `unread` is left out, for `verify_file`
    to check when they are needed.

    Raises:
        UserError: there is no readable manifest of this kind.
        CheckFailed: a file is missing, changed, linked, unlisted or outside the folder.
    """
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("kind") != kind or not isinstance(files, dict):
        found = manifest.get("kind")
        raise UserError(
            f"{folder / MANIFEST}: expected a manifest of kind {kind!r}, found {found!r}"
        )
    for name, entry in files.items():
        verify_file(folder, name, entry, read=not unread(name))
    if strict:
        free = manifest.get("free")
        beside = [MANIFEST, *(free if isinstance(free, list) else [])]
        # os.walk does not follow links, so a linked folder shows up as an unlisted name.
        for root, folders, names in os.walk(folder):
            links = [name for name in folders if (Path(root) / name).is_symlink()]
            for name in [*names, *links]:
                relative = (Path(root) / name).relative_to(folder).as_posix()
                if relative not in files and relative not in beside:
                    raise CheckFailed(
                        f"{folder}: {relative!r} is not listed in {MANIFEST}; remove it"
                    )
    return manifest


def verify_file(folder: Path, name: str, entry: Any, *, read: bool = True) -> None:
    """Check one file of a folder against its entry in the manifest; its bytes only with `read`.

    Raises:
        CheckFailed: it is missing, changed, a link, or outside the folder.
    """
    parts = name.split("/")
    if not name or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise CheckFailed(f"{folder / MANIFEST}: {name!r} is not a plain name inside the folder")
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise CheckFailed(f"{folder / MANIFEST}: the entry of {name!r} lacks bytes or sha256")
    path = folder
    for part in parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError:
            raise CheckFailed(
                f"{path}: listed in {MANIFEST} but missing; copy the folder whole"
            ) from None
        if stat.S_ISLNK(status.st_mode):
            raise CheckFailed(f"{path}: is a link; copy the real file into the folder")
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise CheckFailed(f"{path}: is not a plain file with one name; copy it into the folder")
    if status.st_size != entry["bytes"]:
        raise CheckFailed(
            f"{path}: has {status.st_size} bytes, {MANIFEST} says {entry['bytes']}; copy it again"
        )
    if not read:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckFailed(
            f"{path}: cannot be read ({error.strerror}); let its owner allow it, or copy it again"
        ) from None
    if found != entry["sha256"]:
        raise CheckFailed(
            f"{path}: its sha256 differs from {MANIFEST}, the file was changed; copy it again"
        )


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` that becomes `target` when the block ends without an error.

    On any error the staged folder is removed and whatever stood at `target` still stands. An
    existing target is replaced only with `force`, and only after the new one is complete.

    Raises:
        UserError: it exists, cannot be written, or is the working folder.
    """
    if (target.exists() or target.is_symlink()) and not force:
        raise UserError(
            f"{target}: exists already; choose another folder, or replace it with --force"
        )
    if target.name in ("", "..") or target.resolve() == Path.cwd():
        raise UserError(f"{target}: the folder one stands in cannot be replaced; choose another")
    staging = target.with_name(f"{_STAGING_PREFIX}{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        sync_folder(staging)
        _swap(staging, target)
        sync_directory(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = error.strerror or str(error)
        raise UserError(f"{target}: cannot be written ({reason}); {_remedy(error)}") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap(staging: Path, target: Path) -> None:
    """Rename staging to target; an old target steps aside first and comes back if that fails."""
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f"{_STAGING_PREFIX}old-{target.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(folder)


def sync_directory(folder: Path) -> None:
    """Flush a folder's names to the disk, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(folder: Path) -> list[str]:
    """Remove staged leftovers of writers that died; the names removed, for the caller to report.

    Only for folders that one process owns at a time (a locked run folder): a live writer's staging
    folder would be removed as well.
    """
    stale = sorted(path for path in _children(folder) if path.name.startswith(_STAGING_PREFIX))
    for path in stale:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in stale]


def _children(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _remedy(error: OSError) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space, then run the same command again; nothing else was changed"
    return "check the path and its permissions; nothing else was changed"
