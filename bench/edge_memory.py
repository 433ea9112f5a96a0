"""What the memory of a process that runs an exported folder goes to.

    python -P -m gptopt.bench.edge_memory FOLDER --precision q4

A process of its own tells its resident memory after each stage: the program and its libraries, the
opened model, and texts of the lengths that `gptopt bench inference` reads. Private memory holds the
packed weights, the cache and activations; that of files libraries and weights, as they were read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gptopt.errors import CheckFailed

_STAGES = ((512, 1), (32, 128), (896, 128))  # tokens read, tokens made


def main() -> None:
    """Print the stages as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(_stages(given.folder, given.precision, given.threads)))  # noqa: T201 - result


def profile_memory(folder: Path, precision: str, threads: int = 0) -> dict[str, Any]:
    """Run this module on a folder.

    Returns:
        stages: of each {stage, private_mib, files_mib, peak_mib (of the process until then)};
        weights_mib, cache_mib (of a full context): what the model itself needs.

    Raises:
        CheckFailed: its process ended early.
    """
    command = [sys.executable, "-P", "-m", "gptopt.bench.edge_memory", str(folder.absolute())]
    command += ["--precision", precision, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or "nothing was said"
        raise CheckFailed(
            f"{folder}: the process that profiles it ended with {done.returncode}: {said}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _stages(folder: Path, precision: str, threads: int) -> dict[str, Any]:
    import numpy as np
    import onnxruntime  # noqa: F401 - what a program takes before it opens a model

    from gptopt.bench.peers.edge import Peer

    stages = [_stage("program")]
    peer = Peer(folder, precision, threads)
    stages.append(_stage("opened"))
    random = np.random.default_rng(0)
    for read, made in _STAGES:
        peer.generate(random.integers(0, peer.model.tokenizer_size, (1, read)), made)
        stages.append(_stage(f"{read} read, {made} made"))
    config = peer.model.config
    numbers = 2 * config["n_layer"] * config["kv_heads"] * config["head_size"]
    return {
        "stages": stages,
        "weights_mib": peer.disk_bytes / 2**20,
        "cache_mib": numbers * config["block_size"] * peer.cache_bytes / 2**20,
    }


def _stage(name: str) -> dict[str, Any]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    told = {key: value for key, _, value in (line.partition(":") for line in lines)}

    def mib(*keys: str) -> float:
        return sum(int(told[key].split()[0]) for key in keys) / 1024

    return {
        "stage": name,
        "private_mib": mib("RssAnon"),
        "files_mib": mib("RssFile", "RssShmem"),
        "peak_mib": mib("VmHWM"),
    }


if __name__ == "__main__":
    from gptopt.cli import in_one_line

    sys.exit(in_one_line(main))
