"""Tokenising takes as much memory for a large corpus as for a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The bounds on what is held at once, lowered so that a small corpus is well beyond them.
CHILD = """
import json, re, sys
from pathlib import Path
from gptopt.config import TokenizeOptions
from gptopt.data import prepare, tokenize
prepare._SAMPLE_CHARACTERS = prepare._BATCH_CHARACTERS = 2**19
result = tokenize(TokenizeOptions(inputs=[sys.argv[1]], out=sys.argv[2], kind=sys.argv[3],
                                  vocab_size=400, json=True))
# Not ru_maxrss: Linux counts into it what the parent had when it started this process.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(json.dumps([result["train_tokens"], int(peak) * 1024]))
"""


def write(folder, megabytes):
    """One long text, and as much in many documents."""
    folder.mkdir()
    line = "the %d. cat sat on mat %d and looked at the dog that ran to door %d\n"
    lines = [line % (i, i * i % 9973, i % 89) for i in range(2000)]
    text = "".join(lines)
    half = megabytes * 500_000
    (folder / "long.txt").write_text(text * (half // len(text)))
    record = json.dumps({"text": "".join(lines[:10])}) + "\n"
    (folder / "many.jsonl").write_text(record * (half // len(record)))


def peak_of(tmp_path, megabytes, kind):
    """(tokens, peak resident bytes) of a process that tokenises so much."""
    name = str(megabytes)
    write(tmp_path / name, megabytes)
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, tmp_path / name, tmp_path / f"{name}-out", kind],
        capture_output=True, text=True, check=True,
        env={"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize(
    ("kind", "small", "large"),
    [("char", 4, 16), pytest.param("bpe", 4, 40, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind, small, large):
    tokens, peak = peak_of(tmp_path, small, kind)
    more_tokens, more_peak = peak_of(tmp_path, large, kind)
    assert more_tokens > 0.9 * large / small * tokens
    # The text that came in, held once anywhere, would show; its tokens would several times over.
    assert more_peak - peak < (large - small) * 1e6 * 2 / 3
