"""The stamp that every result carries: what machine, what versions, which commit."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "onnxruntime", "onnx", "transformers", "numpy")
# Those that decide which kernels a product of few bits gets.
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp",
                 "i8mm")  # fmt: skip
_GPU_STATE = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu"


def stamp() -> dict[str, Any]:
    """Processor (with the instruction sets that matter), cores, memory, versions and commit."""
    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "python": platform.python_version(),
        "versions": dict(_versions(PACKAGES)),
        "commit": _commit(),
    }


def command_line(program: str = "gptopt") -> str:
    """What was typed; of folders of this machine only the last name, for others to read."""
    return shlex.join([*program.split(), *(_named(word) for word in sys.argv[1:])])


def _named(word: str) -> str:
    """A path, or one given as NAME=PATH, by its last name."""
    before, equals, path = word.rpartition("=")
    return before + equals + (Path(path).name if Path(path).is_absolute() else path)


def gpu(index: int) -> dict[str, Any]:
    """What the GPU is and how it stands: maker's name, memory, and nvidia-smi's figures if any."""
    import torch

    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "arch": f"sm_{found.major}{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_gpu_state(index),
    }


def _gpu_state(index: int) -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        done = subprocess.run(
            [program, f"--query-gpu={_GPU_STATE}", "--format=csv,noheader", f"--id={index}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(_GPU_STATE.split(","), values, strict=False))


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its stamp as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": stamp(), **result}, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _instructions() -> list[str]:
    """Of _INSTRUCTIONS those that the first core has; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [name for name in _INSTRUCTIONS if name in told.split()]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, None


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],  # noqa: S607 - git from PATH
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
