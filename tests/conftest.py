"""Fixtures of every test: no network, a fixed seed, and a helper that runs the real command."""

import contextlib
import functools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[2] / "shared"

# A shell starts background jobs deaf to Ctrl-C, and what they start inherits that: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that opens a connection fails; sockets between processes of one machine are fine."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == getattr(socket, "AF_UNIX", None) or address[0] in (
            "127.0.0.1",
            "::1",
            "localhost",
        )
        if not local:
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _heard():
    """Messages reach caplog, whatever a command that ran in this process made of their logger."""
    logger = logging.getLogger("gptopt")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(autouse=True)
def _translations_read_once():
    """torch.onnx reads what it can translate anew for each export, for a second: here once."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    if module is None or "from_torchlib" not in vars(module.ONNXRegistry):
        return
    read = vars(module.ONNXRegistry)["from_torchlib"]
    if not isinstance(read, classmethod):
        return

    @functools.cache
    def once(opset_version):
        return read.__func__(module.ONNXRegistry, opset_version=opset_version)

    def copied(opset_version=module._constants.TORCHLIB_OPSET):
        registry = module.ONNXRegistry()
        registry.__dict__.update(once(opset_version).__dict__)
        registry.functions = {name: [*found] for name, found in registry.functions.items()}
        return registry

    module.ONNXRegistry.from_torchlib = staticmethod(copied)


@pytest.fixture
def tinyshakespeare() -> Path:
    """The text of a published measurement, where it lies beside the checkout."""
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("tiny Shakespeare is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def gptopt() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `gptopt ...` as a user would, in a process of its own."""

    def run(*arguments: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "gptopt", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})},
            **kwargs,
        )
        if check:
            assert done.returncode == 0, done.stderr[-2000:]
        return done

    return run


class Killed(BaseException):
    """Ends a run in this process as abruptly as Python can."""


@pytest.fixture
def dying_after(monkeypatch) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with dying_after(5):` the run inside dies after as many steps."""

    @contextlib.contextmanager
    def dying(steps: int) -> Iterator[None]:
        from gptopt.training.step import Stepper

        original = Stepper.step

        def deadly(self, *arguments, **keywords):
            if self.state.step == steps:
                raise Killed
            return original(self, *arguments, **keywords)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Stepper, "step", deadly)
            yield

    return dying


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
