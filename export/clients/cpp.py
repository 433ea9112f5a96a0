"""The C++ client: compiled here where ORT_INCLUDE names onnxruntime's headers.

No registry carries the headers; the library is the one inside the Python package. Run as a program:
python -m gptopt.export.clients.cpp REQUEST.json RESULT.json
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gptopt.errors import UserError
from gptopt.export.clients.environments import clients_folder, python_of

INCLUDE = "ORT_INCLUDE"
_SOURCE = Path(__file__).parent / "runners" / "onnxruntime.cpp"
_LIBRARY = "libonnxruntime.so.1"  # the name that the program asks the loader for


def compiled() -> Path:
    """The client's program, compiled anew where its source changed; see `build`."""
    return build(_SOURCE, clients_folder() / "cpp" / "onnxruntime")


def build(source: Path, program: Path) -> Path:
    """A program that uses onnxruntime's library, compiled where it is older than its source.

    Raises:
        UserError: headers, compiler or library are missing, or it does not compile.
    """
    include = Path(os.environ.get(INCLUDE, ""))
    if not (include / "onnxruntime_cxx_api.h").is_file():
        raise UserError(
            f"onnxruntime-cpp: no onnxruntime_cxx_api.h in {INCLUDE}={include}; name the folder "
            f"include/ of an onnxruntime release"
        )
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise UserError("onnxruntime-cpp: no C++ compiler; install one, or name it in CXX")
    packages = python_of("onnxruntime").parents[1]
    found = packages.glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.*")
    if (library := next(found, None)) is None:
        raise UserError(
            f"onnxruntime-cpp: no libonnxruntime.so in {packages}; this client runs on Linux "
            f"alone, install it there: make clients"
        )
    folder = program.parent
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / _LIBRARY
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    if not program.is_file() or program.stat().st_mtime < source.stat().st_mtime:
        command = [
            compiler, "-std=c++17", "-O1", f"-I{include}", str(source), str(link),
            f"-Wl,-rpath,{folder}", "-o", str(program),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            wrong = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise UserError(f"onnxruntime-cpp: does not compile: {wrong[:200]}; see {source}")
    return program


def _words(cases: list[dict[str, Any]]) -> str:
    """The request in the words that the program reads."""
    words: list[object] = []
    for case in cases:
        words += [case["name"].replace(" ", "_"), case["padding"], case["tokens"]]
        words += [len(case["prompts"])]
        for prompt in case["prompts"]:
            words += [len(prompt), *prompt]
    return " ".join(map(str, words))


def main(request_path: str, result_path: str) -> int:
    """Play a request; the program's own words go to stderr."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    graph = Path(request["folder"], request["file"])
    settings = (str(request["threads"]), request["cache"])
    command = [str(clients_folder() / "cpp" / "onnxruntime"), str(graph), *settings]
    done = subprocess.run(
        command, input=_words(request["cases"]), text=True, stdout=subprocess.PIPE, check=False
    )
    Path(result_path).write_text(done.stdout, encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
