"""`gptopt doctor`: what is installed, what hardware there is, and which operator body would run."""

import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

from gptopt import __version__, doctor_kernels
from gptopt.config_machine import DoctorOptions
from gptopt.log import say

PACKAGES = (
    "torch", "triton", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript", "numpy",
    "tokenizers", "safetensors", "pydantic", "pyarrow", "matplotlib", "transformers",
    "huggingface_hub",
)  # fmt: skip


def doctor(options: DoctorOptions) -> dict[str, Any]:
    """Report on this machine.

    Returns:
        gptopt, python, platform, packages {name: version | null}, devices [{name, memory_bytes}],
        providers [onnxruntime providers], operators {op: {body, reason}}, problems [text],
        kernels {what they cost, see `doctor_kernels.shipped`}; with --kernels proofs {op: {passed,
        cases, worst, reason}}, or with --compile-only kernels compiled now; with --tune tuned {op:
        [what `gptopt.kernels.tuning.Tuned` says]}.

    Raises:
        UserError: --tune where there is no GPU.
        CheckFailed: a proof failed, or a kernel compiled now must not be shipped.
    """
    # First: a GPU in use has configurations of its own, and what is proven shows in the operators.
    if options.compile_only:
        kernels: dict[str, Any] = {"kernels": doctor_kernels.compile_kernels(options)}
    else:
        kernels = {"kernels": doctor_kernels.shipped()}
        if options.kernels:
            kernels["proofs"] = doctor_kernels.prove_kernels()
        if options.tune:
            kernels["tuned"] = doctor_kernels.tune_kernels()
    packages = {name: _version(name) for name in PACKAGES}
    report: dict[str, Any] = {
        "gptopt": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "devices": _devices(),
        "providers": _providers(),
        "operators": _operators(),
        "problems": _problems(packages),
        **kernels,
    }
    if not options.json_output:
        _show(report)
    doctor_kernels.fail_where_wrong(report)
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    threads = torch.get_num_threads()
    devices: list[dict[str, Any]] = [{"name": f"cpu, {threads} threads", "memory_bytes": None}]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        name = f"cuda:{index} {found.name} sm_{found.major}{found.minor}"
        devices.append({"name": name, "memory_bytes": found.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "memory_bytes": None})
    return devices


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _operators() -> dict[str, dict[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    from gptopt.kernels import explain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: {"body": body, "reason": reason} for op, (body, reason) in explain(device).items()}


def _problems(packages: dict[str, str | None]) -> list[str]:
    problems = []
    if packages["torch"] is None:
        problems.append("torch is not installed: train, generate and export need gptopt[train]")
    if packages["onnxruntime"] is None and packages["onnxruntime-gpu"] is None:
        problems.append("onnxruntime is not installed: run needs gptopt[edge]")
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, "
            "then install one"
        )
    if packages["onnx"] is None:
        problems.append("onnx is not installed: export needs gptopt[export]")
    return problems


def _show(report: dict[str, Any]) -> None:
    say(f"gptopt {report['gptopt']}, Python {report['python']}, {report['platform']}")
    say("executable   " + sys.executable)
    for name, version in report["packages"].items():
        say(f"{name:<17}{version or '-'}")
    for device in report["devices"]:
        memory = device["memory_bytes"]
        say("device       " + device["name"] + (f", {memory / 2**30:.0f} GiB" if memory else ""))
    say("providers    " + (", ".join(report["providers"]) or "-"))
    for op, choice in report["operators"].items():
        say(f"{op:<17}{choice['body']}: {choice['reason']}")
    if report["kernels"] is not None:
        doctor_kernels.show_compiled(report["kernels"])
    if "proofs" in report:
        doctor_kernels.show_proofs(report["proofs"])
    if "tuned" in report:
        doctor_kernels.show_tuned(report["tuned"])
    for problem in report["problems"]:
        say("problem      " + problem)
