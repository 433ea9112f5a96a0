"""The wheel: what it carries, and that it imports where only its base requirements are."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ("gptopt", "gptopt.cli", "gptopt.runtime", "gptopt.config", "gptopt.tokenizer",
        "gptopt.manifest", "gptopt.data")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder whose stale files would be packed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("gptopt", "kernels", "export", "bench"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run(
        [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(out), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def modules(wheel):
    """Those that this environment can import: a client's runner is started in the client's own."""
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    return sorted(
        ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        for name in names
        if name.name != "__main__.py" and name.parent.name != "runners"
    )


def test_the_wheel_carries_every_module_under_one_root(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert all(top == "gptopt" or top.startswith("gptopt-") for top in tops)
    assert "gptopt/py.typed" in names
    on_disk = {"gptopt": "gptopt", "kernels": "gptopt/kernels", "export": "gptopt/export",
               "bench": "gptopt/bench"}  # fmt: skip
    for folder, inside in on_disk.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    """With the train and export extras: those of the environment that runs the tests."""
    code = f"import sys; sys.path.insert(0, {str(wheel)!r})\nimport importlib, gptopt\n"
    code += f"assert gptopt.__file__.startswith({str(wheel)!r})\n"
    names = [name for name in modules(wheel) if name != "gptopt.harness"]  # of the extra eval
    code += f"for name in {names!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)


def test_the_base_imports_in_an_empty_environment(wheel, tmp_path):
    """A fresh environment holds the wheel and the base requirements' own files, nothing else."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    zipfile.ZipFile(wheel).extractall(site)
    for name in _base_distributions():
        _link(name, site)
    code = (
        f"import importlib, json, sys\nfor name in {BASE!r}: importlib.import_module(name)\n"
        "from gptopt.cli import main\nmain(['--help'])\nmain(['run', '--help'])"
    )
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 or "usage: gptopt run" in done.stdout, done.stderr
    missing = subprocess.run(
        [python, "-P", "-m", "gptopt", "train", "x", "--out", "y"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert missing.returncode == 2
    assert "pip install 'gptopt[train]'" in missing.stderr


def _base_distributions():
    """The base requirements and theirs, as installed here."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    found, queue = set(), ["gptopt"]
    while queue:
        for line in requires(queue.pop()) or []:
            needed = Requirement(line)
            name = needed.name.lower()
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and (
                name not in found
            ):
                found.add(name)
                queue.append(name)
    return found


def _link(name, site):
    """Link an installed distribution's top-level files into another site-packages."""
    from importlib.metadata import distribution

    found = distribution(name)
    tops = {
        file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")
    }
    for top in tops:
        source = Path(str(found.locate_file(top)))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def test_the_distribution_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Provides-Extra: edge" in text
    assert "torch" not in json.dumps(
        [
            line
            for line in text.splitlines()
            if line.startswith("Requires-Dist") and "extra" not in line
        ]
    )
