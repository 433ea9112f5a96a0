"""How much memory, time and disk `gptopt tokenize` takes for corpora of growing sizes.

    python -P -m gptopt.bench.tokenising --work FOLDER --out bench/results/tokenising.json

makes each corpus in FOLDER (of texts that every Python carries, no two documents alike; half of it
one long text, half documents in jsonl), tokenises it with the command line, on one core, and
removes it again. Something that grows with the corpus would show in the rows' peak memory.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptopt.bench import machine
from gptopt.bench.corpus import library_texts
from gptopt.cli import in_one_line
from gptopt.log import say

SIZES = (2_000_000_000, 200_000_000, 20_000_000)
JSONL_FILES = 4
_EVERY_S = 0.5  # between looks at the disk


def documents(seed: int) -> Iterator[str]:
    """Some lines of the library each, with a name in them that stands nowhere else; endless."""
    chance = random.Random(seed)  # noqa: S311 - nothing here is secret
    lines = "\n".join(text for _, text in library_texts()).splitlines(keepends=True)
    while True:
        begin = chance.randrange(len(lines) - 200)
        text = "".join(lines[begin : begin + chance.randint(5, 200)])
        name = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 12)))
        yield text.replace("self", name).replace(" the ", f" {name} ", 1)


def write_corpus(folder: Path, size: int) -> None:
    """So many bytes: one text file, and documents in JSONL_FILES files."""
    folder.mkdir(parents=True)
    texts = documents(seed=size)
    with (folder / "long.txt").open("w", encoding="utf-8") as file:
        while file.tell() < size // 2:
            file.writelines(itertools.islice(texts, 1000))
    for number in range(JSONL_FILES):
        with (folder / f"documents-{number}.jsonl").open("w", encoding="utf-8") as file:
            while file.tell() < size // 2 // JSONL_FILES:
                file.writelines(
                    json.dumps({"text": text}) + "\n" for text in itertools.islice(texts, 100)
                )


def measure(work: Path, size: int, vocab_size: int) -> dict[str, Any]:
    """One row: tokenise a corpus of about so many bytes in a process of its own."""
    corpus, out, temporary = work / "corpus", work / "data", work / "temporary"
    for folder in (corpus, out, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    write_corpus(corpus, size)
    temporary.mkdir()
    command = ["tokenize", str(corpus), "--out", str(out), "--vocab-size", str(vocab_size)]
    threads = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gptopt", *command, "--json", "--quiet"],
        stdout=subprocess.PIPE, env={**os.environ, **threads},
    )  # fmt: skip
    most, given = 0, _bytes_in(corpus)
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        most = max(most, _bytes_in(work) - given)
        time.sleep(_EVERY_S)
    assert process.stdout is not None
    answer = process.stdout.read()
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    result = json.loads(answer)
    # Linux counts what this process held when it started the other one: it must be the smaller.
    assert used.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
    row = {
        "corpus_bytes": given,
        "documents": result["documents"],
        "tokens": result["train_tokens"] + result["val_tokens"],
        "shards": len(list(out.glob("*.bin"))),
        "peak_memory_mib": round(used.ru_maxrss * kilobyte / 2**20, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "mb_per_cpu_second": round(given / 1e6 / (used.ru_utime + used.ru_stime), 2),
        "data_folder_bytes": _bytes_in(out),
        "most_disk_bytes": max(most, _bytes_in(out)),
    }
    for folder in (corpus, out, temporary):
        shutil.rmtree(folder)
    return row


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="memory, time and disk of gptopt tokenize")
    parser.add_argument("--work", type=Path, required=True, help="folder with room for the corpora")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES), help="corpora's sizes")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer")
    options = parser.parse_args()
    command = "python -P -m gptopt.bench.tokenising --work FOLDER --out FILE"
    if tuple(options.bytes) != SIZES:
        command += f" --bytes {' '.join(map(str, options.bytes))}"
    rows = []
    for size in options.bytes:
        rows.append(measure(options.work, size, options.vocab_size))
        say(json.dumps(rows[-1]))
        machine.write(options.out, {"command": command, "threads": 1, "rows": rows})


if __name__ == "__main__":
    sys.exit(in_one_line(main))
