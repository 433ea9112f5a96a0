"""The arrows between the floors, held by reading every import statement."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"gptopt": "gptopt", "kernels": "gptopt.kernels", "export": "gptopt.export"}
HEAVY = ("torch", "triton", "onnx", "onnx_ir", "onnxscript", "transformers")
POSIX_ONLY = {"fcntl", "pwd", "grp", "resource", "termios", "tty", "pty"}
TOP = ("gptopt.cli", "gptopt.demo", "gptopt.bench")

# What a package may not import, whatever the depth of the statement.
FORBIDDEN = {
    "gptopt.kernels": ("gptopt.export", "gptopt.bench", "gptopt.model", "gptopt.training",
                       "gptopt.data", "gptopt.runtime", "gptopt.config", "gptopt.errors",
                       "gptopt.checkpoint", "gptopt.log", "onnx", "onnxruntime"),
    "gptopt.export": ("gptopt.training", "gptopt.bench"),
    "gptopt.runtime": (*HEAVY, "gptopt.kernels", "gptopt.export", "gptopt.model",
                       "gptopt.checkpoint", "gptopt.training", *POSIX_ONLY),
    "gptopt.model": ("gptopt.export", "gptopt.training", "gptopt.bench", "onnx", "onnxruntime"),
    "gptopt.training": ("gptopt.export", "gptopt.bench", "onnx", "onnxruntime"),
    "gptopt.data": ("torch", "triton", "gptopt.export", "gptopt.training", "gptopt.model"),
    "gptopt.config": (*HEAVY, "numpy"),
    "gptopt.errors": HEAVY,
    "gptopt.log": HEAVY,
    "gptopt.tokenizer": HEAVY,
    "gptopt.manifest": (*HEAVY, *POSIX_ONLY),
    "gptopt.cli": HEAVY,
    "gptopt.verbs": HEAVY,
}  # fmt: skip


def modules():
    """(dotted name, path) of every module of the distribution."""
    for folder, dotted in {**FLOORS, "bench": "gptopt.bench"}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([dotted, *parts]).removesuffix(".__init__"), path


def imports(path, dotted):
    """Every module named by an import statement, functions' bodies included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.rsplit(".", node.level - 1)[0]
                base = f"{start}.{base}".rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_import_runs_against_the_arrows(package):
    for dotted, path in modules():
        if not within(dotted, package):
            continue
        for name in imports(path, dotted):
            bad = [banned for banned in FORBIDDEN[package] if within(name, banned)]
            assert not bad, f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_import_only_torch_triton_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "gptopt"}
    for dotted, path in modules():
        if within(dotted, "gptopt.kernels"):
            for name in imports(path, dotted):
                top = name.partition(".")[0]
                assert top in allowed, f"{path.relative_to(ROOT)} imports {name}"
                assert top != "gptopt" or within(name, "gptopt.kernels") or name == "gptopt"


def test_nobody_imports_the_top():
    for dotted, path in modules():
        if dotted in ("gptopt.__main__", *TOP) or within(dotted, "gptopt.bench"):
            continue
        for name in imports(path, dotted):
            assert not any(within(name, top) for top in TOP), f"{path} imports {name}"


def test_short_names_of_the_folders_are_never_imported():
    for dotted, path in modules():
        for name in imports(path, dotted):
            assert name.partition(".")[0] not in ("kernels", "export", "bench"), path


@pytest.mark.parametrize(
    "code",
    [
        "import gptopt",
        "import gptopt.runtime",
        "import gptopt.runtime.verbs",
        "import gptopt.config, gptopt.manifest, gptopt.tokenizer",
        "import gptopt.data",
        "from gptopt.cli import main; main(['--help'])",
    ],
)
def test_the_edge_loads_no_torch_triton_or_onnx(code):
    check = f"import sys; heavy = set({HEAVY!r}) & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-P", "-c", f"{code}\n{check}"], check=True, cwd="/")


def test_every_module_has_a_docstring_and_at_most_400_lines():
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
        assert text.isascii(), f"{path} is not ASCII"


def test_every_package_on_disk_is_in_the_distribution():
    import tomllib

    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {dotted for dotted, path in modules() if path.name == "__init__.py"}
    assert listed == found


def test_tests_are_not_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_of_the_machine_is_in_the_tree():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = os.path.expanduser("~")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".jsonl", ""):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert str(ROOT.parent) + "/" not in text, name
            assert home + "/" not in text, name
