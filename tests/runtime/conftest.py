"""Small exported folders, made by hand once and copied for each test that harms them."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptopt.tokenizer import Tokenizer

_SPEC = importlib.util.spec_from_file_location(
    "tiny_edge", Path(__file__).with_name("tiny_edge.py")
)
tiny_edge = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_edge)

TEXT = "The quick brown fox jumps over the lazy dog. \N{FOX FACE} na\u00efve caf\u00e9!\n" * 4


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], kind="bpe", vocab_size=300)


@pytest.fixture(scope="session")
def build_folder(tokenizer, tmp_path_factory):
    """build_folder(**sizes) -> a new exported folder."""

    def build(**options) -> Path:
        folder = tmp_path_factory.mktemp("edge") / "edge"
        return tiny_edge.build_folder(folder, tokenizer, **options)

    return build


@pytest.fixture(scope="session")
def pristine(build_folder):
    return build_folder(external=True)


@pytest.fixture
def folder(pristine, tmp_path):
    """An exported folder that a test may change."""
    return shutil.copytree(pristine, tmp_path / "edge")


@pytest.fixture(scope="session")
def edge(pristine):
    from gptopt.runtime import EdgeModel

    return EdgeModel(pristine, threads=1)


@pytest.fixture
def prompts(tokenizer):
    """Prompts of 1 to 11 ids."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, tokenizer.size - 1, size=n).tolist() for n in (5, 1, 11)]
