"""Weights in huge pages: what is looked for, that nothing changes, that it happens once."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from gptopt.runtime import pages, session
from gptopt.runtime.edge import EdgeModel

MIB = 2**20
MAPS = """\
55d000000000-55d002000000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0 
7f0001000000-7f0001100000 rw-p 00000000 00:00 0 
7f0002000000-7f0004000000 rw-p 00000000 fe:00 77                         /x/model.onnx_data
7f0005000000-7f0007000000 rw-s 00000000 00:00 0 
7f0008000000-7f000a000000 r--p 00000000 00:00 0 
7ffe00000000-7ffe02000000 rw-p 00000000 00:00 0                          [stack]
"""  # noqa: W291 - as the system writes it


def test_only_large_private_writable_memory_of_no_file_is_looked_at():
    found = [(low, (high - low) // MIB) for low, high in pages._regions(MAPS)]
    assert found == [(0x55D000000000, 32), (0x7F0000000000, 8)]


SMAPS = """\
7f0000000000-7f0000800000 rw-p 00000000 fe:00 77                         /x/a model.onnx_data
Rss:                2048 kB
Anonymous:             0 kB
VmFlags: rd wr mr mw me
7f0002000000-7f0002800000 rw-p 00800000 fe:00 77                         /x/a model.onnx_data
Anonymous:             4 kB
7f0004000000-7f0004800000 rw-p 00000000 fe:00 78                         /x/other.onnx_data
Anonymous:             0 kB
7f0006000000-7f0006800000 rw-p 00000000 00:00 0 
Anonymous:             0 kB
"""  # noqa: W291 - as the system writes it


def test_only_what_was_read_of_that_file_is_let_go():
    assert list(pages._clean(SMAPS, "/x/a model.onnx_data")) == [(0x7F0000000000, 8 * MIB)]
    assert list(pages._clean(SMAPS, "model.onnx_data")) == []


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@linux
def test_stretches_are_all_in_use():
    block = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    first = -(-address // pages._HUGE)
    used = np.frombuffer(block, np.uint8)
    used[: 8 * MIB : 4096] = 1
    places = {
        start // pages._HUGE - first + step
        for start, size in pages._stretches(ctypes.CDLL(None))
        if address <= start < address + 16 * MIB
        for step in range(size // pages._HUGE)
    }
    whole = (address + 8 * MIB) // pages._HUGE - first  # huge pages that end in the used half
    assert places == set(range(whole))


@linux
def test_what_lies_there_stays_the_same():
    kept = np.random.default_rng(0).integers(0, 256, 24 * MIB, dtype=np.uint8)
    copy = bytes(kept)
    moved = pages.use_huge_pages()
    assert kept.tobytes() == copy
    assert moved % pages._HUGE == 0
    release = tuple(int(n) for n in re.findall(r"\d+", Path("/proc/version").read_text())[:2])
    assert moved > 0 or release < (6, 1)


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "win32")
    assert pages.use_huge_pages() == 0


def test_a_long_text_moves_the_weights_once(folder, monkeypatch):
    done = []
    monkeypatch.setattr(session, "use_huge_pages", lambda: done.append(1))
    monkeypatch.setattr(session, "_SETTLED", 3)
    opened = EdgeModel(folder, threads=1).new_cache().session
    for _ in range(2):
        opened.count_step()
    assert not done
    for _ in range(4):
        opened.count_step()
    assert done == [1]


def resident(block):
    """Pages of a mapping that this process holds."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            here = low <= address < high
        elif here and line.startswith("Rss:"):
            found = int(line.split()[1]) // 4
    return found


@linux
def test_a_mapped_file_is_let_go_and_read_again(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (4 * MIB // 256))
    with path.open("r+b") as file:
        block = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    assert sum(block[::4096]) == 0
    assert resident(block) == 4 * MIB // 4096
    assert pages.let_go(path) == 4 * MIB
    assert resident(block) == 0
    assert block[:256] == bytes(range(256))
    block[0] = 7  # a page of this process's own: no other way back
    assert pages.let_go(path) == 0
    assert block[0] == 7
