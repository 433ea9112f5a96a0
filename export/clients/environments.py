"""One environment per client, because what they pin cannot be installed together.

`make clients` runs this module. Everything lands in one folder, `.clients` or what the environment
variable GPTOPT_CLIENTS names; a client that is there in the same versions is left as it is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gptopt.errors import UserError

FOLDER = "GPTOPT_CLIENTS"
_ONNXRUNTIME = "onnxruntime==1.31.1"
PYTHON = {
    "onnxruntime": (_ONNXRUNTIME, "numpy"),
    "genai": ("onnxruntime-genai==0.18.0", _ONNXRUNTIME, "numpy"),
    # Newer versions of transformers lack what optimum-onnx imports.
    "optimum": ("optimum-onnx==0.1.0", "transformers<4.58", "torch==2.13.0", _ONNXRUNTIME, "onnx"),
    "openvino": ("openvino==2026.4.1", "numpy"),
}
NODE = (
    "onnxruntime-node@1.30.0",
    "onnxruntime-web@1.30.0",
    "@huggingface/transformers@4.3.1",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def clients_folder() -> Path:
    """Where the environments lie."""
    return Path(os.environ.get(FOLDER, ".clients")).absolute()


def python_of(client: str) -> Path:
    """The interpreter of a Python client.

    Raises:
        UserError: it is not installed.
    """
    path = clients_folder() / client / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (clients_folder() / client / ".ready").is_file():
        raise UserError(f"{client}: not installed in {clients_folder()}; install it: make clients")
    return path


def node_modules() -> Path:
    """The folder of npm's packages.

    Raises:
        UserError: they or Node are not installed.
    """
    folder = clients_folder() / "node"
    if shutil.which("node") is None:
        raise UserError("node: not found on PATH; install Node.js 18 or newer")
    if not (folder / ".ready").is_file():
        raise UserError(f"node: no packages in {folder}; install them: make clients")
    return folder / "node_modules"


def browser() -> str:
    """Chromium's command, or what the environment variable CHROMIUM names.

    Raises:
        UserError: there is none.
    """
    for name in (os.environ.get("CHROMIUM", ""), *BROWSERS):
        if name and (found := shutil.which(name)):
            return found
    raise UserError(
        "chromium: not found on PATH; install it (Debian: apt-get install chromium), or name "
        "another one in the environment variable CHROMIUM"
    )


def install(client: str, pip_arguments: tuple[str, ...] = ()) -> None:
    """Build the environment of a Python client, or of all clients in Node ("node").

    Raises:
        UserError: pip or npm fails; what they say stands on stderr.
    """
    folder = clients_folder() / client
    wanted = NODE if client == "node" else PYTHON[client]
    ready = folder / ".ready"
    if ready.is_file() and ready.read_text(encoding="utf-8").splitlines() == list(wanted):
        return
    folder.mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    if client == "node":
        # onnxruntime-node's install script downloads what only a GPU needs, from elsewhere.
        npm = shutil.which("npm") or "npm"
        options = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-save")
        commands = [[npm, "install", *options, "--prefix", str(folder), *wanted]]
    else:
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(_pip(folder)), "install", "--quiet", *pip_arguments, *wanted],
        ]
    for command in commands:
        _run(client, command)
    ready.write_text("\n".join(wanted) + "\n", encoding="utf-8")


def _pip(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin") / "pip"


def _run(client: str, command: list[str]) -> None:
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise UserError(f"{client}: {command[0]}: {error.strerror}; install it") from None
    if code:
        raise UserError(f"{client}: {' '.join(command)}: ended with {code}; see its words above")


def main(arguments: list[str]) -> int:
    """Install all clients; the arguments go to pip. Each failure is named at the end."""
    failed = []
    for client in (*PYTHON, "node"):
        sys.stderr.write(f"{client}: {clients_folder() / client}\n")
        try:
            install(client, tuple(arguments))
        except UserError as error:
            failed.append(str(error))
    try:
        browser()
    except UserError as error:
        failed.append(str(error))
    sys.stderr.writelines(f"error: {line}\n" for line in failed)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
