"""What this machine is and can do: device, precision, measured matmul peak, memory, compiler."""

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gptopt import __version__
from gptopt.config import LoopOptions, ModelConfig
from gptopt.config_classifier import labels_of
from gptopt.errors import UserError
from gptopt.kernels import OPERATORS, explain
from gptopt.model import GPT
from gptopt.training.distributed import ALONE, World

_PROBE_SECONDS = 0.2
_PROBE_SIZES = {"cpu": 768, "cuda": 8192}
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """The device a `--device` names; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the name is unknown, or torch cannot see such a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; choose another"
            f" device, or install a CUDA build of torch"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch sees no MPS device here; choose another device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast precision; `auto` is bfloat16 on a CUDA device that computes in it."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast for a forward pass; nothing in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def require_compiler(device: torch.device) -> None:
    """`--compile` generates code that needs a compiler on this machine.

    Raises:
        UserError: none was found.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile on a GPU needs triton; pip install triton, or drop --compile")
    if device.type == "mps":
        return
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++", "cl"]
    if not any(map(shutil.which, candidates)):
        raise UserError(
            f"--compile needs a C++ compiler, and none of {', '.join(candidates)} was found;"
            f" install one (Debian: apt install g++), or drop --compile"
        )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measured matmul rate in operations per second, the best of a few; None where not measured.

    One square product after a warm-up, the same in every run, so that shares of it compare.
    """
    size = _PROBE_SIZES.get(device.type)
    if size is None:
        return None
    left = torch.randn(size, size, device=device, dtype=dtype, generator=_probe_generator(device))
    best, started = float("inf"), time.perf_counter()
    torch.mm(left, left)
    while best == float("inf") or time.perf_counter() - started < _PROBE_SECONDS:
        best = min(best, _timed_matmul(left))
    return 2 * size**3 / best


def _probe_generator(device: torch.device) -> torch.Generator:
    # A generator of its own: the run's random numbers must not depend on the probe.
    return torch.Generator(device).manual_seed(0)


def _timed_matmul(left: torch.Tensor) -> float:
    if left.device.type != "cuda":
        started = time.perf_counter()
        torch.mm(left, left)
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    torch.mm(left, left)
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def flops_per_token(model: GPT, block_size: int) -> float:
    """Operations of one forward and backward pass per token.

    6 per weight of a matrix product (4 where it is frozen), plus the attention products at the
    average number of keys a causal query sees. Source: Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B (which counts every key, causal or not). Looking up an embedding is no product.
    """
    config = model.config
    tied = config.tie_head and labels_of(config) is None
    looked_up = ("wpe.weight",) if tied else ("wpe.weight", "wte.weight")
    products = sum(
        parameter.numel() * (6 if parameter.requires_grad else 4)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in looked_up
    )
    keys = (block_size + 1) / 2 if config.causal else float(block_size)
    if config.window is not None:
        keys = min(keys, float(config.window))
    attention = 12 * config.n_layer * config.n_head * config.head_size * keys
    return products + attention


def memory_bytes(device: torch.device) -> int | None:
    """Peak memory: of torch's allocations on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def environment(
    device: torch.device,
    dtype: torch.dtype,
    options: LoopOptions,
    peak: float | None,
    world: World = ALONE,
) -> dict[str, Any]:
    """What a later reader needs to judge the run's speed and numbers; no environment variables."""
    import numpy as np

    return {
        "gptopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": device_name(device),
        "torch_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "dtype": dtype_name(dtype),
        "operators": _operators(device, options.kernels),
        "compile": options.compile,
        "cuda_graph": options.cuda_graph,
        "ranks": world.size,
        "parallel": world.parallel,
        "activation_checkpointing": options.activation_checkpointing,
        "matmul_peak_flops": peak,
    }


def _operators(device: torch.device, kernels: str) -> dict[str, str]:
    """Which body of each operator runs."""
    if kernels != "auto":
        return dict.fromkeys(OPERATORS, kernels)
    return {name: body for name, (body, _) in explain(device, prove=True).items()}


def device_name(device: torch.device) -> str:
    """The name its maker gave it, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux alone tells, and only here
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def refuse_too_large(config: ModelConfig, device: torch.device, parts: int = 1) -> None:
    """A mistyped size should fail now, not by swapping or by the system's out-of-memory killer.

    Args:
        config: of the model.
        device: which holds it.
        parts: how many devices share it.

    Raises:
        UserError: fp32 weights, gradients and AdamW's moments alone exceed the device's memory.
    """
    needed, there = 16 * estimate_parameters(config) // parts, total_memory_bytes(device)
    if there is not None and needed > there:
        raise UserError(
            f"a model of {config.n_layer} layers x {config.n_embd} channels needs"
            f" {needed / 2**30:,.0f} GiB for weights, gradients and moments, {device} has"
            f" {there / 2**30:,.0f} GiB; choose a smaller model"
        )


def estimate_parameters(config: ModelConfig) -> int:
    """Weights of the matrices and embeddings, without building them."""
    assert config.vocab_size is not None
    C = config.n_embd
    attention = C * config.head_size * (2 * config.n_head + 2 * config.kv_heads)
    ffn = C * config.ffn_width * (3 if config.gated else 2)
    vocabularies = 1 if config.tie_head else 2
    positions = config.block_size if config.position == "learned" else 0
    return config.n_layer * (attention + ffn) + C * (vocabularies * config.vocab_size + positions)


def total_memory_bytes(device: torch.device) -> int | None:
    """Memory of the device, or of the machine; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
