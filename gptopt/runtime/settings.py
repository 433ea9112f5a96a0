"""How onnxruntime's threads work on this machine: given, measured once by `--tune`, or the default.

Threads that spin while they wait start the next node sooner, but where another process needs the
core they halve the speed (seen with GPT-2 on two cores). Which is better only a measurement knows.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gptopt import usercache

Spinning = Literal["off", "run", "on"]
SPINNING: tuple[Spinning, ...] = ("off", "run", "on")


@dataclass(frozen=True)
class Settings:
    """Of one session.

    Attributes:
        threads: that share the work of one node; 0: onnxruntime takes one per physical core.
        spinning: waiting threads sleep ("off"), spin while a run lasts ("run"), or spin on after
            it for a while too ("on").
    """

    threads: int = 0
    spinning: Spinning = "off"

    def entries(self) -> dict[str, str]:
        """onnxruntime's session configuration."""
        return {
            "session.intra_op.allow_spinning": "0" if self.spinning == "off" else "1",
            "session.force_spinning_stop": "1" if self.spinning == "run" else "0",
        }


def machine() -> dict[str, Any]:
    """What a measured choice depends on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cpus": cpus(),
        **versions,
    }


def cpus() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _place(provider: str) -> str:
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return f"edge/{provider}-{key[:20]}.json"


def measured(provider: str) -> Settings | None:
    """The choice that `--tune` kept for this machine; None where there is no usable one."""
    found = usercache.recall(_place(provider)) or {}
    threads, spinning = found.get("threads"), found.get("spinning")
    if type(threads) is not int or not 0 < threads <= cpus() or spinning not in SPINNING:
        return None
    return Settings(threads, spinning)


def keep(provider: str, settings: Settings, rates: list[dict[str, Any]]) -> bool:
    """Keep a measured choice for this machine; whether it could be written."""
    return usercache.keep(
        _place(provider), {**asdict(settings), "rates": rates, "machine": machine()}
    )


def chosen(provider: str, threads: int = 0, spinning: Spinning | None = None) -> Settings:
    """What was asked for; the rest as measured on this machine, or the defaults."""
    found = measured(provider) or Settings()
    if threads and threads != found.threads:
        found = Settings(threads)  # the spinning was measured with another number
    return found if spinning is None else replace(found, spinning=spinning)
