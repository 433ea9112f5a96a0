"""Where Linux keeps the weights: in huge pages, and only once.

A token reads all weights, and with pages of 4 KiB the processor looks up some 20,000 addresses on
the way: in huge pages it takes a tenth less time. The memory is onnxruntime's own, so it cannot be
asked for in huge pages; what lies in it is moved there afterwards, 2 MiB at a time. Where the
system cannot do that (other systems, Linux before 6.1, no free huge page), everything stays where
it is.

Products read a packed copy of their weights, made while a session is opened. What was read for it
stays mapped, and counts as this process's memory, until it is let go. Rows of a table that are
looked up later come back from the system's own copy of the file.
"""

import ctypes
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_PAGE, _HUGE = 4096, 2**21
_MADV_DONTNEED, _MADV_COLLAPSE = 4, 25
_LARGE = 2 * _HUGE  # regions below hold no weights worth moving
_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")


def use_huge_pages() -> int:
    """Move this process's large, fully used stretches of memory into huge pages; bytes moved.

    Only what is all in use moves, so that memory grows by nothing.
    """
    if sys.platform != "linux" or not _MAPS.is_file():
        return 0
    library = ctypes.CDLL(None)
    moved = 0
    for start, size in _stretches(library):
        if library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_COLLAPSE) == 0:
            moved += size
    logger.debug("%.0f MiB moved into huge pages", moved / 2**20)
    return moved


def let_go(path: Path) -> int:
    """Unmap what was read of a file that is mapped, until it is read again; bytes of its regions.

    Where a region holds pages that were written to, it stays as it is.
    """
    if sys.platform != "linux" or not path.is_file() or not _SMAPS.is_file():
        return 0
    library, gone = ctypes.CDLL(None), 0
    name = str(path.resolve())
    for start, size in _clean(_SMAPS.read_text(encoding="utf-8", errors="replace"), name):
        if not library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED):
            gone += size
    return gone


def _clean(smaps: str, name: str) -> Iterator[tuple[int, int]]:
    """(address, bytes) of a file's regions, all of whose pages are the file's own."""
    start = size = 0
    for line in smaps.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):  # the line that begins a region
            low, high = (int(part, 16) for part in key.split("-"))
            _, _, _, _, *named = rest.split(maxsplit=4)  # rights, offset, device, inode
            start, size = low, (high - low if named == [name] else 0)
        elif key == "Anonymous:" and size and rest.split()[0] == "0":
            yield start, size


def _stretches(library: ctypes.CDLL) -> Iterator[tuple[int, int]]:
    """(address, bytes) of runs of huge pages' places all of whose pages are in use."""
    for low, high in _regions(_MAPS.read_text(encoding="utf-8", errors="replace")):
        start, end = -(-low // _HUGE) * _HUGE, high // _HUGE * _HUGE
        count = (end - start) // _HUGE
        if count <= 0:
            continue
        used = (ctypes.c_ubyte * (count * (_HUGE // _PAGE)))()
        if library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), used):
            continue
        full = b"\1" * (_HUGE // _PAGE)
        state = bytes(used)
        begin = None
        for place in range(count + 1):
            part = state[place * len(full) : (place + 1) * len(full)]
            if part == full and begin is None:
                begin = place
            elif part != full and begin is not None:
                yield start + begin * _HUGE, (place - begin) * _HUGE
                begin = None


def _regions(maps: str) -> Iterator[tuple[int, int]]:
    """Private, writable memory of no file, as /proc/self/maps lists it: (first, last + 1)."""
    for line in maps.splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in addresses.split("-"))
        ours = not name or name[0] == "[heap]" or name[0].startswith("[anon")
        if rights == "rw-p" and inode == "0" and ours and high - low >= _LARGE:
            yield low, high
