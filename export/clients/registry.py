"""The programs that an exported folder is made for, and how each is asked for greedy tokens."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptopt.errors import UserError
from gptopt.export.clients.cpp import INCLUDE, compiled
from gptopt.export.clients.environments import browser, node_modules, python_of

RUNNERS = Path(__file__).parent / "runners"
_SECONDS = 300
_WORDS = 600
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception)\b")

Command = Callable[[Path, Path, Path], list[str]]
"""(request, result, picture) -> the command; raises UserError where the client is missing."""


@dataclass(frozen=True, slots=True)
class Client:
    """One program.

    Attributes:
        cases: names of the cases it has a way to play with a causal model. Every client is asked
            for "masked", that of a masked language model.
        command: see Command.
    """

    name: str
    cases: tuple[str, ...]
    command: Command


def _python(client: str, runner: str) -> Command:
    return lambda request, result, _: [
        str(python_of(client)), str(RUNNERS / runner), str(request), str(result)
    ]  # fmt: skip


def _node(library: str) -> Command:
    return lambda request, result, _: [
        "node", str(RUNNERS / "node.mjs"), library, str(node_modules()), str(request), str(result)
    ]  # fmt: skip


def _browser(library: str, device: str) -> Command:
    return lambda request, result, picture: [
        "node", str(RUNNERS / "browser.mjs"), library, device, browser(), str(node_modules()),
        str(request), str(result), str(picture),
    ]  # fmt: skip


def _cpp(request: Path, result: Path, _: Path) -> list[str]:
    compiled()
    module = "gptopt.export.clients.cpp"
    return [sys.executable, "-P", "-m", module, str(request), str(result)]


_IDS = ("greedy", "left padding", "right padding")
_TJS = ("greedy", "left padding", "text")
_CLIENTS = (
    Client("onnxruntime", _IDS, _python("onnxruntime", "onnxruntime_python.py")),
    Client("genai", ("greedy", "right padding", "text"), _python("genai", "genai.py")),
    Client("optimum", ("greedy", "left padding", "text"), _python("optimum", "optimum_onnx.py")),
    Client("openvino", _IDS, _python("openvino", "openvino_python.py")),
    Client("onnxruntime-node", _IDS, _node("onnxruntime")),
    Client("onnxruntime-web", _IDS, _browser("onnxruntime", "wasm")),
    Client("transformers.js", _TJS, _node("transformers")),
    Client("transformers.js-web", _TJS, _browser("transformers", "wasm")),
)
_GPU = (
    Client("onnxruntime-webgpu", _IDS, _browser("onnxruntime", "webgpu")),
    Client("transformers.js-webgpu", _TJS, _browser("transformers", "webgpu")),
)
_CPP = Client("onnxruntime-cpp", _IDS, _cpp)
CLIENTS = {client.name: client for client in (*_CLIENTS, *_GPU, _CPP)}
WEBGPU = tuple(client.name for client in _GPU)
"""Those that compute on a GPU, or in software as one would: for --target web."""
INSTALLABLE = tuple(client.name for client in _CLIENTS)
"""Those whose parts a registry of packages carries: what "all" means."""


def find_clients(names: str) -> list[Client]:
    """The clients of a comma-separated list, or "all", the C++ one only where ORT_INCLUDE is set.

    Raises:
        UserError: one of them is unknown.
    """
    if names == "all":
        return [CLIENTS[name] for name in INSTALLABLE] + [_CPP] * (INCLUDE in os.environ)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in CLIENTS]
    if unknown or not wanted:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"--clients: found {found}, expected all, or some of {', '.join(CLIENTS)}")
    return [CLIENTS[name] for name in wanted]


def ask(client: Client, request: dict[str, Any], picture: Path | None = None) -> dict[str, Any]:
    """Let a client play the cases of a request.

    Args:
        client: the program.
        request: "folder", "file", "precision", "cache" (EdgeFile's), "external" (names of the files
            with its weights), "pad_id", "threads", "causal", and "cases": each with "name",
            "tokens", and either "prompts" (token ids) with "padding" ("left" or "right"), or
            "text".
        picture: where a browser's screenshot goes.

    Returns:
        "version", and under "cases" for each name "tokens" and "logits" (those behind the prompt;
        where no tokens were asked for, those of all its positions, in a row) of each row, "prompts"
        and "text" where it read a text itself; or "error".

    Raises:
        UserError: the client is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="gptopt-client-") as folder:
        asked, result = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = client.command(asked, result, picture or Path(folder, "picture.png"))
        failure = _run(command)
        if not failure and result.is_file():
            answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return answer
    error = {"error": failure or "it wrote no result"}
    return {"version": None, "cases": {case["name"]: error for case in request["cases"]}}


def _run(command: Sequence[str]) -> str:
    """What went wrong, or nothing."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False,
            env={**os.environ, **quiet}, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} s"
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # Python names the error last, perhaps in several lines; Node goes on with its trace.
    names = [at for at, line in enumerate(said) if _ERROR.match(line)]
    lines = [line for line in said[names[-1] if names else -1 :] if not line.startswith("at ")]
    return " ".join(lines)[:_WORDS] or f"ended with {done.returncode}"
