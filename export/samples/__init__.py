"""Small programs that go into every exported folder, one file each, for people to read and run.

They are the same in every folder: what differs between folders they read from its config.json. That
of a classifier has the Python one alone; the others know tokens only.
gptopt copies them and never runs one that lies in a folder.
"""

from pathlib import Path

from gptopt.manifest import write_text

LABELS = ("run.py",)
SAMPLES = ("run.py", "run.mjs", "run.cpp", "index.html")
PHONES = ("Generate.kt", "Generate.swift")
FOLDER = "samples"


def write_samples(folder: Path, *, labels: bool = False, phones: bool = False) -> None:
    """Copy the programs to `folder`/samples, those for phones only where they are asked for."""
    (folder / FOLDER).mkdir()
    for name in LABELS if labels else (*SAMPLES, *(PHONES if phones else ())):
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        write_text(folder / FOLDER / name, text)
